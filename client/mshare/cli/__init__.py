"""The command ``mshare``."""
