/* Preloaded into a process: counts the calls by which it changes a folder, and kills it or fails at one of them.

   A process arms itself with fault_arm (by ctypes, after a fork), or is armed from its start by FAULT_FOLDER,
   FAULT_KINDS, FAULT_NTH, FAULT_MODE and FAULT_ERRNO. With a log every counted call is a line "name path bytes".
   Reads of mapped files are no calls and cannot fail here. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind {
    OPEN = 1, WRITE = 2, TRUNCATE = 4, SYNC = 8, RENAME = 16, UNLINK = 32, MKDIR = 64, RMDIR = 128, LINK = 256,
    LOCK = 512, CLOSE = 1024, READ = 2048, OPEN_READ = 4096
};
enum mode { COUNT, KILL_BEFORE, KILL_AFTER, KILL_HALF, FAIL, FAIL_ON, SHORT };

#define MAX_FILES 65536
enum { INSIDE = 1, WRITABLE = 2 };

static char folder[PATH_MAX];
static size_t folder_length;
static int armed_kinds, armed_mode, armed_errno, log_descriptor = -1;
static long armed_nth;
static atomic_long calls;
static _Atomic unsigned char files[MAX_FILES];

void fault_arm(const char *in, int kinds, long nth, int mode, int error, int log) {
    folder_length = strlen(in);
    memcpy(folder, in, folder_length + 1);
    armed_kinds = kinds;
    armed_nth = nth;
    armed_mode = mode;
    armed_errno = error;
    log_descriptor = log;
    atomic_store(&calls, 0);
}

long fault_calls(void) { return atomic_load(&calls); }

void fault_disarm(void) { folder_length = 0; }

__attribute__((constructor)) static void arm_from_environment(void) {
    const char *in = getenv("FAULT_FOLDER"), *kinds = getenv("FAULT_KINDS"), *nth = getenv("FAULT_NTH");
    const char *mode = getenv("FAULT_MODE"), *error = getenv("FAULT_ERRNO");
    if (in != NULL)
        fault_arm(in, kinds ? atoi(kinds) : 2047, nth ? atol(nth) : 0, mode ? atoi(mode) : 0, error ? atoi(error) : 0,
                  mode ? -1 : 2);
}

static int is_inside(int at, const char *path) {
    if (folder_length == 0 || path == NULL)
        return 0;
    if (path[0] != '/')
        return at >= 0 && at < MAX_FILES && (files[at] & INSIDE);
    return strncmp(path, folder, folder_length) == 0 && (path[folder_length] == '/' || path[folder_length] == 0);
}

static int is_inside_file(int descriptor) {
    return folder_length != 0 && descriptor >= 0 && descriptor < MAX_FILES && (files[descriptor] & INSIDE);
}

static void die(void) {
    syscall(SYS_kill, getpid(), SIGKILL);
    for (;;)
        pause();
}

static void note(const char *name, int descriptor, const char *path, size_t bytes) {
    char line[2 * PATH_MAX], link[64], target[PATH_MAX] = "";
    if (path == NULL || path[0] != '/') {
        snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
        ssize_t length = readlink(link, target, sizeof target - 1);
        target[length > 0 ? length : 0] = 0;
    }
    int length = snprintf(line, sizeof line, "%s %s%s%s %zu\n", name, target, target[0] && path ? "/" : "",
                          path ? path : "", bytes);
    syscall(SYS_write, log_descriptor, line, (size_t)length);
}

/* What is to happen to this call: COUNT for nothing. */
static int step(int kind, const char *name, int descriptor, const char *path, size_t bytes) {
    if (!(armed_kinds & kind))
        return COUNT;
    long number = atomic_fetch_add(&calls, 1) + 1;
    if (log_descriptor >= 0)
        note(name, descriptor, path, bytes);
    int mode = armed_mode;
    if (armed_nth <= 0 || (mode == FAIL_ON ? number < armed_nth : number != armed_nth))
        return COUNT;
    if (mode == KILL_BEFORE || (mode == KILL_HALF && kind != WRITE))
        die();
    if (mode == SHORT && kind != WRITE && kind != READ)
        return COUNT;
    return mode == FAIL_ON ? FAIL : mode;
}

#define REAL(name) \
    static __typeof__(&name) real; \
    if (real == NULL) \
        real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

#define FAIL_IF_TOLD \
    if (action == FAIL) { \
        errno = armed_errno; \
        return -1; \
    }

#define RETURN(result) \
    do { \
        if (action == KILL_AFTER) \
            die(); \
        return result; \
    } while (0)

static int opened(int descriptor, int inside, int flags) {
    if (descriptor >= 0 && descriptor < MAX_FILES)
        files[descriptor] = inside ? INSIDE | ((flags & O_ACCMODE) != O_RDONLY ? WRITABLE : 0) : 0;
    return descriptor;
}

#define OPENING(at, path, flags, call) \
    do { \
        mode_t mode = 0; \
        if (flags & (O_CREAT | __O_TMPFILE)) { \
            va_list rest; \
            va_start(rest, flags); \
            mode = va_arg(rest, mode_t); \
            va_end(rest); \
        } \
        int inside = is_inside(at, path), action = COUNT; \
        int writes = (flags & O_ACCMODE) != O_RDONLY || (flags & (O_CREAT | O_TRUNC)); \
        if (inside) \
            action = step(writes ? OPEN : OPEN_READ, writes ? "open" : "open_read", at, path, 0); \
        FAIL_IF_TOLD \
        int result = opened(call, inside, flags); \
        RETURN(result); \
    } while (0)

int open(const char *path, int flags, ...) { REAL(open); OPENING(AT_FDCWD, path, flags, real(path, flags, mode)); }
int open64(const char *path, int flags, ...) { REAL(open64); OPENING(AT_FDCWD, path, flags, real(path, flags, mode)); }
int openat(int at, const char *path, int flags, ...) {
    REAL(openat);
    OPENING(at, path, flags, real(at, path, flags, mode));
}
int openat64(int at, const char *path, int flags, ...) {
    REAL(openat64);
    OPENING(at, path, flags, real(at, path, flags, mode));
}

int close(int descriptor) {
    REAL(close);
    int writable = is_inside_file(descriptor) && (files[descriptor] & WRITABLE), action = COUNT;
    if (writable)
        action = step(CLOSE, "close", descriptor, NULL, 0);
    if (descriptor >= 0 && descriptor < MAX_FILES)
        files[descriptor] = 0;
    int result = real(descriptor); /* closed even where it fails, as on Linux */
    FAIL_IF_TOLD
    RETURN(result);
}

/* Half of it, in whole sectors where it may be a direct write. */
static size_t half(size_t bytes) { return bytes >= 2048 ? bytes / 2 / 512 * 512 + 512 : (bytes + 1) / 2; }

#define TRANSFER(kind, name, bytes, call, part) \
    do { \
        int action = COUNT; \
        if (is_inside_file(descriptor)) \
            action = step(kind, name, descriptor, NULL, bytes); \
        FAIL_IF_TOLD \
        if (action == KILL_HALF || action == SHORT) { \
            ssize_t moved = part; \
            if (action == KILL_HALF) \
                die(); \
            if (moved >= 0 || errno != EINVAL) \
                return moved; \
        } \
        ssize_t result = call; \
        RETURN(result); \
    } while (0)

ssize_t write(int descriptor, const void *data, size_t bytes) {
    REAL(write);
    TRANSFER(WRITE, "write", bytes, real(descriptor, data, bytes), real(descriptor, data, half(bytes)));
}
ssize_t pwrite(int descriptor, const void *data, size_t bytes, off_t at) {
    REAL(pwrite);
    TRANSFER(WRITE, "write", bytes, real(descriptor, data, bytes, at), real(descriptor, data, half(bytes), at));
}
ssize_t pwrite64(int descriptor, const void *data, size_t bytes, off64_t at) {
    REAL(pwrite64);
    TRANSFER(WRITE, "write", bytes, real(descriptor, data, bytes, at), real(descriptor, data, half(bytes), at));
}
ssize_t sendfile(int descriptor, int from, off_t *at, size_t bytes);
ssize_t sendfile64(int descriptor, int from, off64_t *at, size_t bytes);
ssize_t sendfile(int descriptor, int from, off_t *at, size_t bytes) {
    REAL(sendfile);
    TRANSFER(WRITE, "write", bytes, real(descriptor, from, at, bytes), real(descriptor, from, at, half(bytes)));
}
ssize_t sendfile64(int descriptor, int from, off64_t *at, size_t bytes) {
    REAL(sendfile64);
    TRANSFER(WRITE, "write", bytes, real(descriptor, from, at, bytes), real(descriptor, from, at, half(bytes)));
}
ssize_t copy_file_range(int from, off64_t *at, int descriptor, off64_t *to, size_t bytes, unsigned flags) {
    REAL(copy_file_range);
    TRANSFER(WRITE, "write", bytes, real(from, at, descriptor, to, bytes, flags),
             real(from, at, descriptor, to, half(bytes), flags));
}

static size_t total(const struct iovec *parts, int count) {
    size_t bytes = 0;
    for (int index = 0; index < count; index++)
        bytes += parts[index].iov_len;
    return bytes;
}

#define SCATTER(function, offset_type, kind, label) \
    ssize_t function(int descriptor, const struct iovec *parts, int count, offset_type at) { \
        REAL(function); \
        struct iovec first = count ? parts[0] : (struct iovec){0}; \
        first.iov_len = half(first.iov_len); \
        TRANSFER(kind, label, total(parts, count), real(descriptor, parts, count, at), \
                 real(descriptor, &first, 1, at)); \
    }
#define SCATTER_FLAGS(function, offset_type, kind, label) \
    ssize_t function(int descriptor, const struct iovec *parts, int count, offset_type at, int flags) { \
        REAL(function); \
        struct iovec first = count ? parts[0] : (struct iovec){0}; \
        first.iov_len = half(first.iov_len); \
        TRANSFER(kind, label, total(parts, count), real(descriptor, parts, count, at, flags), \
                 real(descriptor, &first, 1, at, flags)); \
    }
SCATTER(pwritev, off_t, WRITE, "write")
SCATTER(pwritev64, off64_t, WRITE, "write")
SCATTER(preadv, off_t, READ, "read")
SCATTER(preadv64, off64_t, READ, "read")
SCATTER_FLAGS(pwritev2, off_t, WRITE, "write")
SCATTER_FLAGS(pwritev64v2, off64_t, WRITE, "write")
SCATTER_FLAGS(preadv2, off_t, READ, "read")
SCATTER_FLAGS(preadv64v2, off64_t, READ, "read")

ssize_t writev(int descriptor, const struct iovec *parts, int count) {
    REAL(writev);
    TRANSFER(WRITE, "write", total(parts, count), real(descriptor, parts, count), real(descriptor, parts, 1));
}
ssize_t read(int descriptor, void *data, size_t bytes) {
    REAL(read);
    TRANSFER(READ, "read", bytes, real(descriptor, data, bytes), real(descriptor, data, half(bytes)));
}
ssize_t pread(int descriptor, void *data, size_t bytes, off_t at) {
    REAL(pread);
    TRANSFER(READ, "read", bytes, real(descriptor, data, bytes, at), real(descriptor, data, half(bytes), at));
}
ssize_t pread64(int descriptor, void *data, size_t bytes, off64_t at) {
    REAL(pread64);
    TRANSFER(READ, "read", bytes, real(descriptor, data, bytes, at), real(descriptor, data, half(bytes), at));
}

#define ON_FILE(kind, name, call) \
    do { \
        int action = COUNT; \
        if (is_inside_file(descriptor)) \
            action = step(kind, name, descriptor, NULL, 0); \
        FAIL_IF_TOLD \
        int result = call; \
        RETURN(result); \
    } while (0)

int ftruncate(int descriptor, off_t size) { REAL(ftruncate); ON_FILE(TRUNCATE, "truncate", real(descriptor, size)); }
int ftruncate64(int descriptor, off64_t size) {
    REAL(ftruncate64);
    ON_FILE(TRUNCATE, "truncate", real(descriptor, size));
}
int fsync(int descriptor) { REAL(fsync); ON_FILE(SYNC, "sync", real(descriptor)); }
int fdatasync(int descriptor) { REAL(fdatasync); ON_FILE(SYNC, "sync", real(descriptor)); }
int flock(int descriptor, int operation) { REAL(flock); ON_FILE(LOCK, "lock", real(descriptor, operation)); }

#define ON_PATH(at, path, kind, name, call) \
    do { \
        int action = COUNT; \
        if (is_inside(at, path)) \
            action = step(kind, name, at, path, 0); \
        FAIL_IF_TOLD \
        int result = call; \
        RETURN(result); \
    } while (0)

int truncate(const char *path, off_t size) {
    REAL(truncate);
    ON_PATH(AT_FDCWD, path, TRUNCATE, "truncate", real(path, size));
}
int rename(const char *from, const char *to) {
    REAL(rename);
    ON_PATH(AT_FDCWD, from, RENAME, "rename", real(from, to));
}
int renameat(int at, const char *from, int into, const char *to) {
    REAL(renameat);
    ON_PATH(at, from, RENAME, "rename", real(at, from, into, to));
}
int unlink(const char *path) { REAL(unlink); ON_PATH(AT_FDCWD, path, UNLINK, "unlink", real(path)); }
int unlinkat(int at, const char *path, int flags) {
    REAL(unlinkat);
    ON_PATH(at, path, flags & AT_REMOVEDIR ? RMDIR : UNLINK, "unlink", real(at, path, flags));
}
int rmdir(const char *path) { REAL(rmdir); ON_PATH(AT_FDCWD, path, RMDIR, "rmdir", real(path)); }
int mkdir(const char *path, mode_t mode) { REAL(mkdir); ON_PATH(AT_FDCWD, path, MKDIR, "mkdir", real(path, mode)); }
int mkdirat(int at, const char *path, mode_t mode) {
    REAL(mkdirat);
    ON_PATH(at, path, MKDIR, "mkdir", real(at, path, mode));
}
int link(const char *from, const char *to) { REAL(link); ON_PATH(AT_FDCWD, to, LINK, "link", real(from, to)); }
int symlink(const char *target, const char *path) {
    REAL(symlink);
    ON_PATH(AT_FDCWD, path, LINK, "link", real(target, path));
}
