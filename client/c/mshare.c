/* See mshare.h; docs/protocol.md describes what is said and done here, and why. */
#define _GNU_SOURCE
#include "mshare.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000
#endif
#define IOC_NEW 0xAA00 /* USERFAULTFD_IOC_NEW */
#define USER_MODE_ONLY 1
#define VERSION 1
#define PACKET_MAX 65536
#define HEADER 8
#define FDS_MAX 4
#define ANCHOR (1024 * 4096)
#define TRIES 100 /* of what is to be started over, since a creator is at work, or the daemon was restarted */
#ifndef PATIENCE
#define PATIENCE 5000 /* milliseconds to wait for a daemon that was there before: it may be being restarted */
#endif

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* around everything below */
static int sock = -1;
static int fork_events;
static char session[33]; /* names the conversation to the next daemon, should this one be killed */
static uint64_t answered; /* requests of it that have had their answer */
static int known;         /* whether a daemon was there before */
static char mount_point[PATH_MAX];
static struct mshare *attached;
static char packet[PACKET_MAX + 1]; /* the request, then its answer */

static _Thread_local char message[512];

static int fail(int number, const char *format, ...)
{
    va_list rest;
    va_start(rest, format);
    vsnprintf(message, sizeof message, format, rest);
    va_end(rest);
    errno = number;
    return -1;
}

const char *mshare_message(void)
{
    return message;
}

/* ---- JSON: flat objects, as all answers are that are read here ---- */

struct value {
    enum { TEXT, NUMBER, TRUE, FALSE, NONE } kind;
    uint64_t number;
    char text[512]; /* cut, if need be */
};

static const char *skip_space(const char *at)
{
    while (*at == ' ' || *at == '\t' || *at == '\n' || *at == '\r')
        at++;
    return at;
}

static void put(struct value *value, size_t *length, unsigned byte)
{
    if (*length + 1 < sizeof value->text)
        value->text[(*length)++] = (char)byte;
}

static const char *parse_hex(const char *at, unsigned *code)
{
    *code = 0;
    for (int i = 0; i < 4; i++, at++) {
        if (!isxdigit((unsigned char)*at))
            return NULL;
        *code = *code * 16 + (unsigned)(isdigit((unsigned char)*at) ? *at - '0' : (*at | 32) - 'a' + 10);
    }
    return at;
}

/* A letter by its number, as UTF-8; DC80 to DCFF alone stand for bytes that are none (PEP 383). */
static void put_letter(struct value *value, size_t *length, unsigned code)
{
    if (code >= 0xDC80 && code <= 0xDCFF)
        put(value, length, code - 0xDC00);
    else if (code < 0x80)
        put(value, length, code);
    else if (code < 0x800)
        put(value, length, 0xC0 | code >> 6), put(value, length, 0x80 | (code & 63));
    else if (code < 0x10000)
        put(value, length, 0xE0 | code >> 12), put(value, length, 0x80 | (code >> 6 & 63)),
            put(value, length, 0x80 | (code & 63));
    else
        put(value, length, 0xF0 | code >> 18), put(value, length, 0x80 | (code >> 12 & 63)),
            put(value, length, 0x80 | (code >> 6 & 63)), put(value, length, 0x80 | (code & 63));
}

static const char *parse_escape(const char *at, struct value *value, size_t *length)
{
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    const char *found;
    unsigned code, low;

    if (*at != 'u') {
        if (!*at || !(found = strchr(from, *at)))
            return NULL;
        put(value, length, (unsigned char)to[found - from]);
        return at + 1;
    }
    if (!(at = parse_hex(at + 1, &code)))
        return NULL;
    if (code >= 0xD800 && code < 0xDC00 && at[0] == '\\' && at[1] == 'u') {
        const char *after = parse_hex(at + 2, &low);
        if (after && low >= 0xDC00 && low < 0xE000) {
            code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
            at = after;
        }
    }
    put_letter(value, length, code);
    return at;
}

static const char *parse_text(const char *at, struct value *value)
{
    size_t length = 0;

    value->kind = TEXT;
    for (at++; *at != '"';) {
        if ((unsigned char)*at < 0x20)
            return NULL; /* the end, too */
        if (*at == '\\') {
            if (!(at = parse_escape(at + 1, value, &length)))
                return NULL;
        } else {
            put(value, &length, (unsigned char)*at++);
        }
    }
    value->text[length] = 0;
    return at + 1;
}

static const char *parse_number(const char *at, struct value *value)
{
    value->kind = NUMBER;
    value->number = 0;
    if (*at == '0' && isdigit((unsigned char)at[1]))
        return NULL;
    for (; isdigit((unsigned char)*at); at++) {
        if (__builtin_mul_overflow(value->number, 10, &value->number) ||
            __builtin_add_overflow(value->number, (uint64_t)(*at - '0'), &value->number))
            return NULL;
    }
    return at;
}

static const char *parse_value(const char *at, struct value *value)
{
    static const struct {
        const char *word;
        int kind;
    } words[] = {{"true", TRUE}, {"false", FALSE}, {"null", NONE}};

    if (*at == '"')
        return parse_text(at, value);
    if (isdigit((unsigned char)*at))
        return parse_number(at, value);
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) {
        size_t length = strlen(words[i].word);
        if (!strncmp(at, words[i].word, length)) {
            value->kind = words[i].kind;
            return at + length;
        }
    }
    return NULL;
}

/* The value of a key of the one object that `json` must be: 1, or 0 if there is no such key, or -1. */
static int look_up(const char *json, const char *key, struct value *found)
{
    static _Thread_local struct value name, value;
    int result = 0;
    const char *at = skip_space(json);

    if (*at++ != '{')
        return -1;
    at = skip_space(at);
    while (*at != '}') {
        if (*at != '"' || !(at = parse_text(at, &name)))
            return -1;
        at = skip_space(at);
        if (*at++ != ':' || !(at = parse_value(skip_space(at), &value)))
            return -1;
        if (!strcmp(name.text, key)) {
            *found = value;
            result = 1;
        }
        at = skip_space(at);
        if (*at == ',') {
            at = skip_space(at + 1);
            if (*at == '}')
                return -1;
        } else if (*at != '}') {
            return -1;
        }
    }
    return *skip_space(at + 1) ? -1 : result;
}

static int answer_has(const char *key, int kind, struct value *value)
{
    return look_up(packet + HEADER, key, value) == 1 && (int)value->kind == kind;
}

static int number_of(const char *key, uint64_t *number)
{
    struct value value;

    if (!answer_has(key, NUMBER, &value))
        return fail(EPROTO, "the daemon's answer has no number '%s'", key);
    *number = value.number;
    return 0;
}

static int truth_of(const char *key, int *truth)
{
    struct value value;

    if (look_up(packet + HEADER, key, &value) != 1 || (value.kind != TRUE && value.kind != FALSE))
        return fail(EPROTO, "the daemon's answer does not say whether '%s'", key);
    *truth = value.kind == TRUE;
    return 0;
}

/* How many of the bytes at `at` are one letter in UTF-8; 0 if they are none. */
static int letter_length(const unsigned char *at)
{
    int length = 0;

    if (*at < 0x80)
        length = 1;
    else if (*at >= 0xC2 && *at < 0xF5)
        length = *at < 0xE0 ? 2 : *at < 0xF0 ? 3 : 4;
    for (int i = 1; i < length; i++)
        if ((at[i] & 0xC0) != 0x80)
            return 0;
    if ((at[0] == 0xE0 && at[1] < 0xA0) || (at[0] == 0xED && at[1] > 0x9F) || (at[0] == 0xF0 && at[1] < 0x90) ||
        (at[0] == 0xF4 && at[1] > 0x8F))
        return 0;
    return length;
}

/* A name as the inside of a JSON string. -1 if it is too long. */
static int quote(const char *name, char *out, size_t room)
{
    const unsigned char *at = (const unsigned char *)name;
    size_t used = 0;

    while (*at) {
        int length = letter_length(at);
        if (used + 7 > room)
            return fail(ENAMETOOLONG, "a region's name has at most 255 bytes");
        if (length == 0)
            used += (size_t)sprintf(out + used, "\\udc%02x", *at++);
        else if (*at < 0x20 || *at == '"' || *at == '\\')
            used += (size_t)sprintf(out + used, "\\u%04x", *at++);
        else
            while (length--)
                out[used++] = (char)*at++;
    }
    out[used] = 0;
    return 0;
}

/* ---- The connection: one request, one answer ---- */

static void hang_up(void)
{
    int number = errno;

    if (sock >= 0)
        close(sock);
    sock = -1;
    errno = number;
}

static void close_all(const int *fds, int count)
{
    for (int i = 0; i < count; i++)
        close(fds[i]);
}

union ancillary {
    struct cmsghdr align;
    char room[CMSG_SPACE(sizeof(int) * FDS_MAX)];
};

static int say(const char *body, const int *fds, int count)
{
    unsigned char header[HEADER] = {'M', 'S', 'H', 'R', VERSION, 0, (unsigned char)count, 0};
    struct iovec parts[] = {{header, HEADER}, {(void *)body, strlen(body)}};
    union ancillary ancillary = {0};
    struct msghdr all = {.msg_iov = parts, .msg_iovlen = 2};

    if (count) {
        all.msg_control = ancillary.room;
        all.msg_controllen = CMSG_SPACE(sizeof(int) * (size_t)count);
        ancillary.align.cmsg_level = SOL_SOCKET;
        ancillary.align.cmsg_type = SCM_RIGHTS;
        ancillary.align.cmsg_len = CMSG_LEN(sizeof(int) * (size_t)count);
        memcpy(CMSG_DATA(&ancillary.align), fds, sizeof(int) * (size_t)count);
    }
    while (sendmsg(sock, &all, MSG_NOSIGNAL) < 0)
        if (errno != EINTR)
            return fail(errno, "the daemon cannot be asked: %s", strerror(errno));
    return 0;
}

/* The next answer, in `packet`, and its descriptors, which are the caller's; how many. */
static int hear(int *fds)
{
    union ancillary ancillary;
    struct iovec part = {packet, PACKET_MAX};
    struct msghdr all = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = ancillary.room, .msg_controllen = sizeof ancillary};
    ssize_t length;
    int count = 0;

    while ((length = recvmsg(sock, &all, MSG_CMSG_CLOEXEC)) < 0)
        if (errno != EINTR)
            return fail(errno, "the daemon does not answer: %s", strerror(errno));
    for (struct cmsghdr *each = CMSG_FIRSTHDR(&all); each; each = CMSG_NXTHDR(&all, each))
        if (each->cmsg_level == SOL_SOCKET && each->cmsg_type == SCM_RIGHTS) {
            int here = (int)((each->cmsg_len - CMSG_LEN(0)) / sizeof(int));
            memcpy(fds + count, CMSG_DATA(each), sizeof(int) * (size_t)here);
            count += here;
        }
    const unsigned char *header = (unsigned char *)packet;
    int result = 0;
    packet[length] = 0;
    if (length == 0)
        result = fail(ECONNRESET, "the daemon hung up");
    else if (length < HEADER || memcmp(packet, "MSHR", 4) || header[4] != VERSION || header[5])
        result = fail(EPROTO, "the daemon speaks another protocol than version %d of msharefs", VERSION);
    else if (all.msg_flags & (MSG_TRUNC | MSG_CTRUNC) || header[6] + 256 * header[7] != count)
        result = fail(EMFILE, "%d descriptors were sent, %d came; raise `ulimit -n`", header[6] + 256 * header[7], count);
    else if (strlen(packet + HEADER) != (size_t)length - HEADER)
        result = fail(EPROTO, "the daemon's answer is no JSON");
    if (result) {
        close_all(fds, count);
        return -1;
    }
    return count;
}

static int is_answer(const char *op)
{
    struct value value;
    return answer_has("op", TEXT, &value) && !strcmp(value.text, op);
}

/* Turn the answer `failed` into errno, and any other than the one that is expected into EPROTO. */
static int expect(const char *op)
{
    static _Thread_local struct value value;
    uint64_t number;

    if (!answer_has("op", TEXT, &value))
        return fail(EPROTO, "the daemon's answer is not understood");
    if (!strcmp(value.text, op))
        return 0;
    if (strcmp(value.text, "failed") || number_of("errno", &number) || number == 0 || number > 4095)
        return fail(EPROTO, "the daemon answered '%s' instead of '%s'", value.text, op);
    return fail((int)number, "%s", answer_has("message", TEXT, &value) ? value.text : strerror((int)number));
}

static int find_mount(void)
{
    const char *chosen = getenv("MSHAREFS");
    char line[8192], mine[32], *at;
    FILE *file;

    if (chosen && *chosen) {
        if (strlen(chosen) >= sizeof mount_point)
            return fail(ENAMETOOLONG, "MSHAREFS is too long");
        strcpy(mount_point, chosen);
        return 0;
    }
    int have_mine = 0;
    mount_point[0] = 0;
    snprintf(mine, sizeof mine, "user_id=%u,", (unsigned)geteuid());
    if (!(file = fopen("/proc/self/mountinfo", "re")))
        return fail(errno, "/proc/self/mountinfo cannot be read");
    while (fgets(line, sizeof line, file)) {
        char place[PATH_MAX], *out = place;
        if (!strstr(line, " - fuse.msharefs ") || sscanf(line, "%*s %*s %*s %*s %4095s", place) != 1)
            continue;
        int is_mine = strstr(line, mine) != NULL;
        if (!is_mine && (have_mine || !strstr(line, "user_id=0,")))
            continue; /* root's, and we have one; or somebody else's, whom we do not trust */
        for (at = place; *at; out++) {
            unsigned byte;
            if (*at == '\\' && sscanf(at + 1, "%3o", &byte) == 1)
                *out = (char)byte, at += 4;
            else
                *out = *at++;
        }
        *out = 0;
        strcpy(mount_point, place);
        have_mine |= is_mine;
    }
    fclose(file);
    return mount_point[0] ? 0 : fail(ENOENT, "no msharefs is mounted; start one with `mshare up`");
}

static int find_socket(struct sockaddr_un *address)
{
    char path[PATH_MAX + 16], line[4096];
    FILE *file;

    if (find_mount())
        return -1;
    snprintf(path, sizeof path, "%s/mshare_info", mount_point);
    if (!(file = fopen(path, "re")))
        return fail(errno, "%s is no msharefs mount (%s); start one with `mshare up`", mount_point, strerror(errno));
    address->sun_family = AF_UNIX;
    address->sun_path[0] = 0;
    while (fgets(line, sizeof line, file)) {
        line[strcspn(line, "\n")] = 0;
        if (!strncmp(line, "socket ", 7) && strlen(line + 7) < sizeof address->sun_path)
            strcpy(address->sun_path, line + 7);
    }
    fclose(file);
    return address->sun_path[0] ? 0 : fail(EINVAL, "%s names no socket", path);
}

/* Say hello; `*again` is whether the answer to the request that waits is the next packet. */
static int greet(int waiting, int *again)
{
    char body[256];
    unsigned char random[16];
    struct value value;
    int fds[FDS_MAX], count;

    if (!*session) {
        if (getrandom(random, sizeof random, 0) != sizeof random)
            return fail(errno, "no random numbers can be had");
        for (size_t i = 0; i < sizeof random; i++)
            sprintf(session + 2 * i, "%02x", random[i]);
        answered = 0;
    }
    snprintf(body, sizeof body,
             "{\"op\":\"hello\",\"client\":\"C pid %d\",\"session\":\"%s\",\"answered\":%llu,\"waiting\":%s}",
             (int)getpid(), session, (unsigned long long)answered, waiting ? "true" : "false");
    if (say(body, NULL, 0) || (count = hear(fds)) < 0)
        return -1;
    close_all(fds, count);
    *again = answer_has("known", TRUE, &value);
    return expect("welcome") || truth_of("fork_events", &fork_events) ? -1 : 0;
}

static int try_to_connect(int waiting, int *again)
{
    struct sockaddr_un address;

    if (find_socket(&address))
        return -1;
    if ((sock = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0)) < 0)
        return fail(errno, "no socket can be had: %s", strerror(errno));
    if (connect(sock, (struct sockaddr *)&address, sizeof address))
        fail(errno, "no daemon answers at %s: %s; start one with `mshare up`", address.sun_path, strerror(errno));
    else if (!greet(waiting, again))
        return 0;
    hang_up();
    return -1;
}

/* Have a connection. One that was there before may be being restarted: wait for it. */
static int connect_to_daemon(int waiting, int *again)
{
    *again = 0;
    for (int waited = 0, wait = 5; sock < 0; waited += wait, wait = wait < 50 ? 2 * wait : 100) {
        if (!try_to_connect(waiting, again))
            break;
        if (!known || waited > PATIENCE || errno == EPROTO)
            return -1;
        usleep((useconds_t)wait * 1000);
    }
    known = 1;
    return 0;
}

static int is_lost(void)
{
    return errno == EPIPE || errno == ECONNRESET;
}

/* Make a request: how many descriptors came with its answer, which is in `packet`. A daemon that was killed has written
 * down what it has carried out: the next one is asked for the answer first, so that nothing is done twice. What it never
 * heard of is said again, or, if it is about what the old one has said or opened, EAGAIN: to be started over. */
static int ask(const char *body, const int *fds, int count, int *received)
{
    int got = -1, again;

    for (int losses = 0; losses < TRIES; losses++) {
        if (connect_to_daemon(losses > 0, &again))
            return -1;
        if (losses && !again && (count || strstr(body, "\"offer\":")))
            return fail(EAGAIN, "the daemon was restarted meanwhile; nothing has changed, try again");
        if ((again || !say(body, fds, count)) && (got = hear(received)) >= 0) {
            answered++;
            return got;
        }
        hang_up();
        if (!is_lost())
            break;
    }
    int number = errno;
    *session = 0; /* Nobody shall take the answer for another's. */
    errno = number;
    return -1;
}

/* A request whose answer brings nothing but its name. */
static int ask_for(const char *op, const char *body, const int *fds, int count)
{
    int received[FDS_MAX], got = ask(body, fds, count, received);

    if (got < 0)
        return -1;
    close_all(received, got);
    return expect(op);
}

/* ---- Windows ---- */

static int in_child_is_set;

static void in_child(void)
{
    pthread_mutex_init(&lock, NULL);
    hang_up(); /* it is the parent's */
    *session = 0;
}

static void begin(void)
{
    pthread_mutex_lock(&lock);
    if (!in_child_is_set)
        in_child_is_set = !pthread_atfork(NULL, NULL, in_child);
}

static int end(int result)
{
    int number = errno;
    pthread_mutex_unlock(&lock);
    errno = number;
    return result;
}

static int check_name(const char *name)
{
    size_t length = strlen(name);

    if (length > 255)
        return fail(ENAMETOOLONG, "a region's name has at most 255 bytes, this one %zu", length);
    if (!length || name[0] == '.' || strchr(name, '/') || !strcmp(name, "mshare_info"))
        return fail(EINVAL, "'%s' cannot name a region", name);
    return 0;
}

/* The opened file of a region, which proves what its mode allows. */
static int open_ticket(const char *name, int access)
{
    char path[PATH_MAX];
    struct sockaddr_un address;
    int again;

    if (check_name(name) || connect_to_daemon(0, &again))
        return -1;
    if (snprintf(path, sizeof path, "%s/%s", mount_point, name) >= (int)sizeof path)
        return fail(ENAMETOOLONG, "the path of region '%s' is too long", name);
    int fd = open(path, access | O_CLOEXEC), number = errno;
    if (fd < 0 && (number == ENOTCONN || number == ECONNABORTED || find_socket(&address))) {
        hang_up(); /* It has ended. */
        if (connect_to_daemon(0, &again))
            return -1;
        fd = open(path, access | O_CLOEXEC);
        number = errno;
    }
    return fd >= 0 ? fd : fail(number, "region '%s' in %s: %s", name, mount_point, strerror(number));
}

static int make_userfaultfd(int device)
{
    int flags = O_CLOEXEC | O_NONBLOCK;
    int fd = device >= 0 ? ioctl(device, IOC_NEW, flags) : (int)syscall(SYS_userfaultfd, flags | USER_MODE_ONLY);
    return fd >= 0 ? fd : fail(errno, "no userfaultfd can be had: %s", strerror(errno));
}

static void unmap(struct mshare *region)
{
    if (region->address)
        munmap(region->address, region->size);
    if (region->anchor)
        munmap(region->anchor, ANCHOR);
    if (region->userfaultfd >= 0)
        close(region->userfaultfd);
    region->address = region->anchor = NULL;
    region->userfaultfd = -1;
}

static int map_window(struct mshare *region, void *at, int backing)
{
    int flags = (region->readonly ? MAP_PRIVATE : MAP_SHARED) | MAP_NORESERVE | MAP_FIXED_NOREPLACE;
    void *got = mmap(at, region->size, PROT_NONE, flags, backing, 0);

    if (got != MAP_FAILED)
        region->address = got;
    if (got != at)
        return fail(EADDRINUSE, "%p+%#zx is in use in this process; use another address", at, region->size);
    got = mmap(NULL, ANCHOR, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (got == MAP_FAILED)
        return fail(errno, "no anchor can be mapped: %s", strerror(errno));
    region->anchor = got;
    if (!fork_events) { /* A child would have to be armed before it touches anything: it has no window instead. */
        madvise(region->address, region->size, MADV_DONTFORK);
        madvise(region->anchor, ANCHOR, MADV_DONTFORK);
    }
    return 0;
}

/* Tell the daemon where the window is. A second userfaultfd is the daemon's alone, for what it must refuse. */
static int announce(struct mshare *region, uint64_t offer, int device)
{
    char body[256];
    int fds[2];

    if ((fds[0] = region->userfaultfd = make_userfaultfd(device)) < 0 || (fds[1] = make_userfaultfd(device)) < 0)
        return -1;
    snprintf(body, sizeof body, "{\"op\":\"mapped\",\"offer\":%llu,\"addr\":%llu,\"anchor\":%llu,\"staged\":[]}",
             (unsigned long long)offer, (unsigned long long)(uintptr_t)region->address,
             (unsigned long long)(uintptr_t)region->anchor);
    int result = ask_for("attached", body, fds, 2);
    int number = errno;
    close(fds[1]);
    errno = number;
    return result ? -1 : number_of("attachment", &region->attachment);
}

/* Take up the offer in `packet`: map it, have it armed, let this process in. EADDRINUSE: something is in its place. */
static int enter(struct mshare *region, const int *fds, int count)
{
    uint64_t offer = 0, address = 0, size = 0, used;
    struct value value;
    char body[64];
    int device = 0;

    if (expect("offer") || number_of("offer", &offer) || number_of("inode", &region->inode) ||
        number_of("addr", &address) || number_of("size", &size) || truth_of("readonly", &region->readonly) ||
        truth_of("device", &device))
        return -1;
    if (count != 1 + device)
        return fail(EPROTO, "%d descriptors were offered, and %d came", 1 + device, count);
    used = answer_has("used", NUMBER, &value) ? value.number : size;
    region->size = size;
    region->used = used;
    if (map_window(region, (void *)(uintptr_t)address, fds[0]) || announce(region, offer, device ? fds[1] : -1) ||
        mprotect(region->address, region->size, region->readonly ? PROT_READ : PROT_READ | PROT_WRITE)) {
        char words[sizeof message];
        int number = errno;
        memcpy(words, message, sizeof words);
        unmap(region);
        snprintf(body, sizeof body, "{\"op\":\"abort\",\"offer\":%llu}", (unsigned long long)offer);
        ask_for("done", body, NULL, 0);
        return fail(number, "%s", words);
    }
    return 0;
}

/* What is asked of mshare_open. */
struct wish {
    const char *name;
    char address[24]; /* as the daemon is told */
    size_t length;
    int oflags;
    mode_t mode;
};

/* Take up the offer in `packet`; the descriptors that came with it are closed. */
static int enter_and_close(struct mshare *region, const int *fds, int count)
{
    int result = enter(region, fds, count), number = errno;

    close_all(fds, count);
    errno = number;
    return result;
}

static int try_to_attach(struct mshare *region, const struct wish *wish)
{
    char body[128];
    int fds[FDS_MAX], ticket = open_ticket(wish->name, wish->oflags & O_ACCMODE);

    if (ticket < 0)
        return -1;
    snprintf(body, sizeof body, "{\"op\":\"attach\",\"addr\":%s,\"length\":%zu}", wish->address, wish->length);
    int count = ask(body, &ticket, 1, fds);
    int result = count < 0 ? -1 : enter_and_close(region, fds, count), number = errno;
    close(ticket);
    errno = number;
    return result;
}

/* The umask, read without changing it. */
static mode_t read_umask(void)
{
    char line[256];
    unsigned mask = 022;
    FILE *file = fopen("/proc/self/status", "re");

    while (file && fgets(line, sizeof line, file) && sscanf(line, "Umask: %o", &mask) != 1)
        ;
    if (file)
        fclose(file);
    return (mode_t)mask;
}

/* 1 if there is such a region already. */
static int try_to_create(struct mshare *region, const struct wish *wish)
{
    char body[2048], quoted[1800];
    int fds[FDS_MAX], count;

    if (check_name(wish->name) || quote(wish->name, quoted, sizeof quoted))
        return -1;
    snprintf(body, sizeof body,
             "{\"op\":\"create\",\"name\":\"%s\",\"addr\":%s,\"size\":%zu,\"mode\":%u,\"exclusive\":%s,"
             "\"empty\":false,\"readonly\":%s}",
             quoted, wish->address, wish->length, (unsigned)(wish->mode & ~read_umask()),
             wish->oflags & O_EXCL ? "true" : "false", (wish->oflags & O_ACCMODE) == O_RDONLY ? "true" : "false");
    if ((count = ask(body, NULL, 0, fds)) < 0)
        return -1;
    if (is_answer("exists")) {
        close_all(fds, count);
        return 1;
    }
    if (!enter_and_close(region, fds, count))
        return 0;
    if (errno == EADDRINUSE && !strcmp(wish->address, "null"))
        errno = EAGAIN; /* the daemon's next choice is another */
    return -1;
}

static int try_to_open(struct mshare *region, const struct wish *wish)
{
    if (wish->oflags & O_CREAT) {
        int created = try_to_create(region, wish);
        if (created <= 0)
            return created;
    }
    int result = try_to_attach(region, wish);
    if (result && errno == ENOENT && wish->oflags & O_CREAT)
        errno = EAGAIN; /* it went while we looked */
    return result;
}

struct mshare *mshare_attach(const char *name, void *address, int oflags)
{
    if (oflags & O_CREAT) {
        fail(EINVAL, "mshare_attach makes no region; use mshare_open");
        return NULL;
    }
    return mshare_open(name, address, 0, oflags, 0);
}

struct mshare *mshare_open(const char *name, void *address, size_t length, int oflags, mode_t mode)
{
    struct wish wish = {name, "null", length, oflags, mode};
    struct mshare *region;
    int access = oflags & O_ACCMODE, result = -1;

    if (access != O_RDONLY && access != O_RDWR) {
        fail(EINVAL, "a region is opened O_RDONLY or O_RDWR");
        return NULL;
    }
    if (oflags & ~(O_ACCMODE | O_CREAT | O_EXCL | O_CLOEXEC)) {
        fail(EINVAL, "oflags %#o has unknown bits; use O_RDONLY or O_RDWR, O_CREAT, O_EXCL", (unsigned)oflags);
        return NULL;
    }
    if (address)
        snprintf(wish.address, sizeof wish.address, "%llu", (unsigned long long)(uintptr_t)address);
    if (!(region = calloc(1, sizeof *region))) {
        fail(ENOMEM, "no memory");
        return NULL;
    }
    begin();
    region->userfaultfd = -1;
    region->pid = (int)getpid();
    for (int tries = 0; tries < TRIES && result; tries++) {
        result = try_to_open(region, &wish);
        if (result && errno != EAGAIN)
            break; /* EAGAIN: its creator is at work, and the daemon has made us wait already */
    }
    if (!result) {
        region->next = attached;
        attached = region;
    }
    end(0);
    if (result) {
        int number = errno == EADDRINUSE ? EINVAL : errno;
        free(region);
        errno = number;
        return NULL;
    }
    return region;
}

/* The number of this process's attachment: a forked child asks for its own. */
static int own_attachment(struct mshare *region)
{
    char body[64];

    if (region->pid == (int)getpid())
        return 0;
    if (!fork_events)
        return fail(EINVAL, "this process has inherited no window; attach again");
    snprintf(body, sizeof body, "{\"op\":\"adopt\",\"attachment\":%llu}", (unsigned long long)region->attachment);
    if (ask_for("attached", body, NULL, 0) || number_of("attachment", &region->attachment))
        return -1;
    region->pid = (int)getpid();
    return 0;
}

int mshare_detach(struct mshare *region)
{
    char body[64];
    int result = 0;

    begin();
    if (region->address) {
        result = own_attachment(region);
        unmap(region);
        snprintf(body, sizeof body, "{\"op\":\"detach\",\"attachment\":%llu}", (unsigned long long)region->attachment);
        if (!result)
            result = ask_for("done", body, NULL, 0);
    }
    for (struct mshare **each = &attached; *each; each = &(*each)->next)
        if (*each == region) {
            *each = region->next;
            break;
        }
    end(0);
    int number = errno;
    free(region);
    errno = number;
    return result;
}

static int try_to_unlink(const char *name)
{
    char body[2048], quoted[1800], path[PATH_MAX + 258];
    struct stat file;

    int ticket = open_ticket(name, O_RDWR);
    if (ticket < 0 && errno != EACCES)
        return -1;
    snprintf(path, sizeof path, "%s/%s", mount_point, name);
    if (quote(name, quoted, sizeof quoted) || ((ticket < 0 || fstat(ticket, &file)) && stat(path, &file))) {
        int number = errno;
        if (ticket >= 0)
            close(ticket);
        return fail(number, "region '%s': %s", name, strerror(number));
    }
    for (struct mshare *each = attached; each; each = each->next)
        if (each->inode == file.st_ino && each->address) {
            own_attachment(each); /* while the window stands, by which the daemon tells children apart */
            unmap(each);
        }
    snprintf(body, sizeof body, "{\"op\":\"unlink\",\"name\":\"%s\"}", quoted);
    int result = ask_for("done", body, &ticket, ticket >= 0);
    int number = errno;
    if (ticket >= 0)
        close(ticket);
    errno = number;
    return result;
}

int mshare_unlink(const char *name)
{
    int result = -1;

    begin();
    for (int tries = 0; tries < TRIES && result; tries++) {
        result = try_to_unlink(name);
        if (result && errno != EAGAIN)
            break;
    }
    return end(result);
}

int mshare_remove(const char *name)
{
    char body[2048], quoted[1800];

    if (check_name(name) || quote(name, quoted, sizeof quoted))
        return -1;
    begin();
    snprintf(body, sizeof body, "{\"op\":\"remove\",\"name\":\"%s\"}", quoted);
    return end(ask_for("done", body, NULL, 0));
}
