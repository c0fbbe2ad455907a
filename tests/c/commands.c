/* Carries out commands that come line by line, with the C client; one line of answer each. For tests/test_c_client.py. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "mshare.h"

static sigjmp_buf back;
static volatile sig_atomic_t seen;
static void *volatile where;
static struct mshare *regions[10];

static void on_fault(int number, siginfo_t *info, void *context)
{
    (void)context;
    seen = number;
    where = info->si_addr;
    siglongjmp(back, 1);
}

static void answer(int failed)
{
    if (failed)
        printf("errno %d %s\n", errno, mshare_message());
    else
        printf("ok\n");
}

/* touch WHICH OFFSET [BYTE]: load a byte, or store one; what it was, or the signal and the distance from the window. */
static void touch(struct mshare *region, long offset, int byte)
{
    volatile unsigned char *at = (unsigned char *)region->address + offset;

    if (sigsetjmp(back, 1))
        printf("signal %d %ld\n", (int)seen, (long)((char *)where - (char *)region->address));
    else if (byte < 0)
        printf("%d\n", *at);
    else
        *at = (unsigned char)byte, printf("ok\n");
}

static int carry_out(char *line)
{
    char verb[16] = "", name[1024] = "", mode[8] = "rw";
    int which = 0, byte = -1;
    long offset = 0;
    unsigned long address = 0, length = 0;
    unsigned permissions = 0;

    sscanf(line, "%15s", verb);
    if (!strcmp(verb, "attach") && sscanf(line, "%*s %d %1023s %7s %lx", &which, name, mode, &address) >= 2) {
        regions[which] = mshare_attach(name, (void *)address, strcmp(mode, "ro") ? O_RDWR : O_RDONLY);
        answer(!regions[which]);
    } else if (!strcmp(verb, "open") && sscanf(line, "%*s %d %1023s %7s %lx %lu %o", &which, name, mode, &address,
                                               &length, &permissions) >= 5) { /* mode: letters of r w c x t */
        int oflags = (strchr(mode, 'w') ? O_RDWR : O_RDONLY) | (strchr(mode, 'c') ? O_CREAT : 0) |
                     (strchr(mode, 'x') ? O_EXCL : 0) | (strchr(mode, 't') ? O_TRUNC : 0);
        regions[which] = mshare_open(name, (void *)address, length, oflags, permissions);
        answer(!regions[which]);
    } else if (!strcmp(verb, "remove") && sscanf(line, "%*s %1023s", name) == 1) {
        answer(mshare_remove(name));
    } else if (!strcmp(verb, "touch") && sscanf(line, "%*s %d %ld %d", &which, &offset, &byte) >= 2) {
        touch(regions[which], offset, byte);
    } else if (!strcmp(verb, "show") && sscanf(line, "%*s %d", &which) == 1) {
        struct mshare *region = regions[which];
        printf("%p %zu %zu %d\n", region->address, region->size, region->used, region->readonly);
    } else if (!strcmp(verb, "detach") && sscanf(line, "%*s %d", &which) == 1) {
        answer(mshare_detach(regions[which]));
    } else if (!strcmp(verb, "unlink") && sscanf(line, "%*s %1023s", name) == 1) {
        answer(mshare_unlink(name));
    } else if (!strcmp(verb, "child")) { /* the rest of the line, in a child */
        int status;
        fflush(stdout);
        if (!fork()) {
            carry_out(line + 6);
            fflush(stdout);
            _exit(0);
        }
        wait(&status);
        printf("status %d\n", status);
    } else {
        return 1;
    }
    return 0;
}

int main(void)
{
    static char line[2048];
    struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO};

    sigaction(SIGBUS, &action, NULL);
    sigaction(SIGSEGV, &action, NULL);
    while (fgets(line, sizeof line, stdin)) {
        if (carry_out(line))
            return 2;
        fflush(stdout);
    }
    return 0;
}
