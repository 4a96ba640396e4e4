/* What a machine does to a program when it is at its limits, switched on and off while the program runs (LD_PRELOAD).
 *
 * CHAOS_CONTROL names a file that is mapped: struct control, written by tests/chaos/shim.py.  CHAOS_DISK and CHAOS_LOGS
 * are path prefixes, separated by colons: what lies under CHAOS_DISK is on the disk that may be slow or full, what lies
 * under CHAOS_LOGS on the one that logs alone fill.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

struct control {
    volatile int32_t disk_full, logs_full, slow_ms, no_process;
    volatile int64_t clock_offset_s;
    volatile int32_t refused_writes, refused_processes, slowed;
};

static struct control off, *control = &off;
static const char *disk, *logs;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* setproctitle writes over the environment that a process was started with. */
static const char *copy_of(const char *name) {
    const char *value = getenv(name);
    return value ? strdup(value) : NULL;
}

__attribute__((constructor)) static void attach(void) {
    const char *path = getenv("CHAOS_CONTROL");
    disk = copy_of("CHAOS_DISK");
    logs = copy_of("CHAOS_LOGS");
    int file = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (file < 0)
        return;
    void *found = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (found != MAP_FAILED)
        control = found;
}

static int under(const char *path, const char *prefixes) {
    while (prefixes && *prefixes) {
        size_t length = strcspn(prefixes, ":");
        if (length && !strncmp(path, prefixes, length))
            return 1;
        prefixes += length + (prefixes[length] == ':');
    }
    return 0;
}

static int path_of(int file, char path[PATH_MAX]) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length < 0 ? 0 : length] = 0;
    return length > 0 && path[0] == '/';
}

static void slow(const char *path) {
    if (control->slow_ms && under(path, disk)) {
        __sync_fetch_and_add(&control->slowed, 1);
        struct timespec pause = {control->slow_ms / 1000, control->slow_ms % 1000 * 1000000L};
        nanosleep(&pause, NULL);
    }
}

/* Whether a write there fails: ENOSPC, as on a disk without a free block. */
static int refused(int file) {
    if (!control->disk_full && !control->logs_full && !control->slow_ms)
        return 0;
    int saved = errno;
    char path[PATH_MAX];
    int found = path_of(file, path);
    if (found)
        slow(path);
    errno = saved;
    if (!found || !((control->disk_full && under(path, disk)) || (control->logs_full && under(path, logs))))
        return 0;
    __sync_fetch_and_add(&control->refused_writes, 1);
    errno = ENOSPC;
    return 1;
}

ssize_t write(int file, const void *data, size_t size) {
    return size && refused(file) ? -1 : REAL(write)(file, data, size);
}

ssize_t pwrite64(int file, const void *data, size_t size, off64_t at) {
    return size && refused(file) ? -1 : REAL(pwrite64)(file, data, size, at);
}

int fsync(int file) {
    return refused(file) ? -1 : REAL(fsync)(file);
}

int rename(const char *from, const char *to) {
    slow(to);
    return REAL(rename)(from, to);
}

int open64(const char *path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;
    va_end(more);
    slow(path);
    return REAL(open64)(path, flags, mode);
}

/* No process and no thread more: EAGAIN, as under RLIMIT_NPROC or pids.max. */
static int none_left(void) {
    if (control->no_process)
        __sync_fetch_and_add(&control->refused_processes, 1);
    return control->no_process;
}

pid_t fork(void) {
    if (none_left()) {
        errno = EAGAIN;
        return -1;
    }
    return REAL(fork)();
}

pid_t vfork(void) {     /* a wrapper must not return twice into one frame; fork does the same, slower */
    return fork();
}

int posix_spawn(pid_t *pid, const char *path, const posix_spawn_file_actions_t *actions,
                const posix_spawnattr_t *attributes, char *const argv[], char *const envp[]) {
    return none_left() ? EAGAIN : REAL(posix_spawn)(pid, path, actions, attributes, argv, envp);
}

int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*body)(void *), void *argument) {
    return none_left() ? EAGAIN : REAL(pthread_create)(thread, attributes, body, argument);
}

/* The wall clock jumps; the monotonic one never does. */
int clock_gettime(clockid_t clock, struct timespec *now) {
    static __typeof__(&clock_gettime) real;
    if (!real)
        real = REAL(clock_gettime);
    int failed = real(clock, now);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        now->tv_sec += control->clock_offset_s;
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    (void)zone;
    struct timespec found;
    clock_gettime(CLOCK_REALTIME, &found);
    now->tv_sec = found.tv_sec;
    now->tv_usec = found.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *where) {
    struct timespec found;
    clock_gettime(CLOCK_REALTIME, &found);
    if (where)
        *where = found.tv_sec;
    return found.tv_sec;
}
