/* Makes chosen system calls on files below chosen folders fail, for tests. Loaded with LD_PRELOAD; see injection.py.
 *
 * faults_arm     starts counting calls that change files; the call of a given number fails, and perhaps all after it
 * faults_disarm  stops, and returns how many calls were counted
 * faults_log     returns a line for each call: its name and path
 *
 * Calls are counted by every thread of the process. A path belongs to a folder if it begins with the folder's.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define LOG_BYTES (1 << 22)

enum { FROM_THEN_ON = 1, ALSO_REMOVALS = 2, ONLY_READS = 4 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char folders[8192], calls[LOG_BYTES];
static size_t used;
static long counted, failing_call;
static int armed, error_number, flags;

void faults_arm(const char *colon_separated, long call, int number, int how)
{
    pthread_mutex_lock(&lock);
    snprintf(folders, sizeof folders, "%s", colon_separated);
    counted = 0, used = 0, calls[0] = 0;
    failing_call = call, error_number = number, flags = how, armed = 1;
    pthread_mutex_unlock(&lock);
}

long faults_disarm(void)
{
    pthread_mutex_lock(&lock);
    armed = 0;
    pthread_mutex_unlock(&lock);
    return counted;
}

const char *faults_log(void) { return calls; }

static int is_below(const char *path)
{
    const char *start = folders;
    while (*start) {
        size_t length = strcspn(start, ":");
        if (length && !strncmp(path, start, length) && (path[length] == '/' || !path[length]))
            return 1;
        start += length + (start[length] == ':');
    }
    return 0;
}

/* Counts a call on an absolute path; returns whether it is to fail, with errno set. */
static int fails(const char *name, const char *path)
{
    int result = 0, kept = errno;
    pthread_mutex_lock(&lock);
    if (armed && is_below(path)) {
        counted++;
        if (used + 600 < LOG_BYTES)
            used += snprintf(calls + used, 600, "%s %.560s\n", name, path);
        result = counted == failing_call || (failing_call && counted > failing_call && (flags & FROM_THEN_ON));
    }
    pthread_mutex_unlock(&lock);
    errno = result ? error_number : kept;
    return result;
}

static int fails_at(const char *name, int folder, const char *path)
{
    char absolute[2 * PATH_MAX], link[64], base[PATH_MAX] = "";
    if (!armed)
        return 0;
    if (path[0] == '/')
        return fails(name, path);
    if (folder == AT_FDCWD) {
        if (!getcwd(base, sizeof base))
            return 0;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t length = readlink(link, base, sizeof base - 1);
        base[length < 0 ? 0 : length] = 0;
    }
    snprintf(absolute, sizeof absolute, "%s/%s", base, path);
    return fails(name, absolute);
}

static int fails_on(const char *name, int file)
{
    char link[64], path[PATH_MAX];
    if (!armed || (flags & ONLY_READS))
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0)
        return 0;
    path[length] = 0;
    return fails(name, path);
}

#define CHANGES(call) (!(flags & ONLY_READS) && (call))
#define REMOVES(call) ((flags & ALSO_REMOVALS) && (call))
#define NEXT(type, name) static type (*next)(); if (!next) next = dlsym(RTLD_NEXT, name)

static int opens_for_us(int how)
{
    int writes = (how & O_ACCMODE) != O_RDONLY || (how & (O_CREAT | O_TRUNC));
    return (flags & ONLY_READS) ? !writes && !(how & (O_DIRECTORY | O_PATH)) : writes;
}

#define OPEN(function)                                                                  \
    int function(const char *path, int how, ...)                                        \
    {                                                                                   \
        NEXT(int, #function);                                                           \
        va_list rest; va_start(rest, how); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
        if (opens_for_us(how) && fails_at("open", AT_FDCWD, path)) return -1;           \
        return next(path, how, mode);                                                   \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(function)                                                                \
    int function(int folder, const char *path, int how, ...)                            \
    {                                                                                   \
        NEXT(int, #function);                                                           \
        va_list rest; va_start(rest, how); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
        if (opens_for_us(how) && fails_at("open", folder, path)) return -1;             \
        return next(folder, path, how, mode);                                           \
    }
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int file, const void *data, size_t size)
{
    NEXT(ssize_t, "write");
    return fails_on("write", file) ? -1 : next(file, data, size);
}
ssize_t writev(int file, const struct iovec *parts, int count)
{
    NEXT(ssize_t, "writev");
    return fails_on("write", file) ? -1 : next(file, parts, count);
}
ssize_t pwrite64(int file, const void *data, size_t size, off64_t at)
{
    NEXT(ssize_t, "pwrite64");
    return fails_on("write", file) ? -1 : next(file, data, size, at);
}
ssize_t sendfile64(int out, int in, off64_t *at, size_t size)
{
    NEXT(ssize_t, "sendfile64");
    return fails_on("write", out) ? -1 : next(out, in, at, size);
}
ssize_t sendfile(int out, int in, off_t *at, size_t size)
{
    NEXT(ssize_t, "sendfile");
    return fails_on("write", out) ? -1 : next(out, in, at, size);
}
ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t size, unsigned how)
{
    NEXT(ssize_t, "copy_file_range");
    return fails_on("write", out) ? -1 : next(in, from, out, to, size, how);
}
int ftruncate64(int file, off64_t size)
{
    NEXT(int, "ftruncate64");
    return fails_on("truncate", file) ? -1 : next(file, size);
}
int ftruncate(int file, off_t size)
{
    NEXT(int, "ftruncate");
    return fails_on("truncate", file) ? -1 : next(file, size);
}
int fsync(int file)
{
    NEXT(int, "fsync");
    return fails_on("fsync", file) ? -1 : next(file);
}
int fdatasync(int file)
{
    NEXT(int, "fdatasync");
    return fails_on("fsync", file) ? -1 : next(file);
}
int mkdir(const char *path, mode_t mode)
{
    NEXT(int, "mkdir");
    return CHANGES(fails_at("mkdir", AT_FDCWD, path)) ? -1 : next(path, mode);
}
int mkdirat(int folder, const char *path, mode_t mode)
{
    NEXT(int, "mkdirat");
    return CHANGES(fails_at("mkdir", folder, path)) ? -1 : next(folder, path, mode);
}
int rename(const char *from, const char *to)
{
    NEXT(int, "rename");
    return CHANGES(fails_at("rename", AT_FDCWD, to)) ? -1 : next(from, to);
}
int renameat(int folder, const char *from, int other, const char *to)
{
    NEXT(int, "renameat");
    return CHANGES(fails_at("rename", other, to)) ? -1 : next(folder, from, other, to);
}
int unlink(const char *path)
{
    NEXT(int, "unlink");
    return REMOVES(fails_at("unlink", AT_FDCWD, path)) ? -1 : next(path);
}
int unlinkat(int folder, const char *path, int how)
{
    NEXT(int, "unlinkat");
    return REMOVES(fails_at("unlink", folder, path)) ? -1 : next(folder, path, how);
}
int rmdir(const char *path)
{
    NEXT(int, "rmdir");
    return REMOVES(fails_at("rmdir", AT_FDCWD, path)) ? -1 : next(path);
}
