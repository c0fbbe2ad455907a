/* Regions of msharefs, from C and from whatever calls C.
 *
 * Two files, no library but libc: compile mshare.c with your program (cc -pthread). Linux 6.1 or later, x86-64. The
 * daemon `mshared` must run. docs/protocol.md in the repository tells what passes between the two.
 *
 * Every call sets errno as the kernel's own call would; mshare_message() has the text, with the cure. All are safe to
 * use from several threads. Children of fork(2) inherit windows and count as attached, and may use every call.
 */
#ifndef MSHARE_H
#define MSHARE_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#ifdef __cplusplus
extern "C" {
#endif

/* An attached region: `size` bytes at `address`, of which users see `used`. A touch of a hole is a SIGBUS, one against
 * the protection of its mapping a SIGSEGV, with si_addr. Read it; only the calls below change it. */
struct mshare {
    void *address; /* NULL once it is unlinked */
    size_t size;
    size_t used;
    int readonly;
    /* What follows is the library's. */
    uint64_t inode, attachment;
    void *anchor;
    int userfaultfd;
    int pid;
    struct mshare *next;
};

/* Create the region `name`, or attach to it. With O_CREAT in `oflags` it is made if there is none, of `length` bytes of
 * read-write memory at `address`, NULL for one of the daemon's choice; with O_EXCL, too, it must be new. `mode` less
 * umask are the permissions of its file. Without O_CREAT, or if there is one: attach to it, at its own address, where it
 * is for everybody, for `address` NULL; `length` 0, or its own. O_RDONLY gives a window that cannot write, else O_RDWR.
 * Of what backing its memory is, the daemon decides (`mshared --backing`); `mshare create` and Python let one choose.
 *
 * NULL with errno: ENOENT (no such region, or no daemon), EEXIST, EACCES, EINVAL (the range is in use here, or not
 * aligned; a wrong length, name or flag), ENAMETOOLONG, ENOSPC, ENOMEM, EDQUOT, EPROTO. */
struct mshare *mshare_open(const char *name, void *address, size_t length, int oflags, mode_t mode);

/* The same without O_CREAT. */
struct mshare *mshare_attach(const char *name, void *address, int oflags);

/* Unmap the window, end this reference, and free `region`. -1 with errno; the window is gone all the same. */
int mshare_detach(struct mshare *region);

/* End this process's access: its windows on the region are unmapped, and their `address` is NULL (mshare_detach frees
 * them). The last process to do so ends the region. -1 with errno: ENOENT, EBUSY (others are attached and we are not),
 * EACCES. */
int mshare_unlink(const char *name);

/* Take the name away at once, whoever is attached, as unlink(2) does; the memory goes with its last window. -1 with errno:
 * ENOENT, EACCES, EPERM (the mount is sticky, and the region somebody else's). */
int mshare_remove(const char *name);

/* What the last call of this thread that failed has to say. */
const char *mshare_message(void);

#ifdef __cplusplus
}
#endif
#endif
