"""What a worker process can do, a module for each kind of work."""
