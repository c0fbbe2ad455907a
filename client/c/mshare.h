/* Attach to regions of msharefs, from C and from whatever calls C.
 *
 * Two files, no library but libc: compile mshare.c with your program (cc -pthread). Linux 6.1 or later, x86-64. The
 * daemon `mshared` must run; regions are made from Python, or by the command `mshare create`. docs/protocol.md in the
 * repository tells what passes between the two.
 *
 * Every call sets errno as the kernel's own call would; mshare_message() has the text, with the cure. All are safe to
 * use from several threads. Children of fork(2) inherit windows and count as attached, and may use every call.
 */
#ifndef MSHARE_H
#define MSHARE_H

#include <stddef.h>
#include <stdint.h>

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

/* Attach to the region `name`: `address` NULL is its own address, where it is for everybody; O_RDONLY in `oflags` gives
 * a window that cannot write, else O_RDWR. NULL with errno: ENOENT (no such region, or no daemon), EACCES, EINVAL (the
 * range is in use here, or not aligned), EPROTO. */
struct mshare *mshare_attach(const char *name, void *address, int oflags);

/* Unmap the window, end this reference, and free `region`. -1 with errno; the window is gone all the same. */
int mshare_detach(struct mshare *region);

/* End this process's access: its windows on the region are unmapped, and their `address` is NULL (mshare_detach frees
 * them). The last process to do so ends the region. -1 with errno: ENOENT, EBUSY (others are attached and we are not),
 * EACCES. */
int mshare_unlink(const char *name);

/* What the last call of this thread that failed has to say. */
const char *mshare_message(void);

#ifdef __cplusplus
}
#endif
#endif
