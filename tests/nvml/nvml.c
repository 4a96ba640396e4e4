/* A stand-in for libnvidia-ml.so.1: the functions that gpu.py calls through the real pynvml.

   It shows the devices of devices.json in the folder SIMULATOR_MEMORY_DIR; what is used of them is what the other
   files there say that processes hold (simulation/devices.py tells the formats).  The file `driver` there says how it
   behaves, one `name value...` a line:

     frees_late_ms 300      memory of a process that has ended stays used for so long
     processes full|no_memory|none    are processes listed, and with their memory?
     pid_offset 100000      processes are shown by other numbers, as in a container
     lost 3 5               these devices have fallen off the bus
     mig 7                  these are split by MIG
     down 1                 no driver is loaded
     epoch 2                another driver was loaded: whoever initialised before must begin anew
     order 3 1 0 2          the devices by position (default: as in devices.json)
     old 1                  a driver without version 2 of the memory figures and version 3 of the processes
     slow_ms 500            every question takes so long

   Build: cc -shared -fPIC -O1 -o libnvidia-ml.so.1 nvml.c -lpthread  */

#define _GNU_SOURCE
#include <ctype.h>
#include <dirent.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7,
       DRIVER_NOT_LOADED = 9, FUNCTION_NOT_FOUND = 13, GPU_IS_LOST = 15, UNKNOWN = 999 };
enum { MAX_DEVICES = 64, MAX_HOLDINGS = 4096, MAX_TEXT = 1 << 16 };

typedef unsigned long long u64;
typedef struct { int index; u64 total, reserved, used; char uuid[96], name[96]; } Device;
typedef struct { int pid, ended, devices[MAX_DEVICES], count; u64 bytes; } Holding;
typedef struct { unsigned pid; u64 used; unsigned gpu_instance, compute_instance; } Process;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int initialised, epoch_then;
static Device devices[MAX_DEVICES];
static Holding holdings[MAX_HOLDINGS];
static int device_count, holding_count;
static char driver[MAX_TEXT];

/* --- the files --- */

static const char *folder(void) {
    const char *path = getenv("SIMULATOR_MEMORY_DIR");
    return path ? path : "";
}

static int read_file(const char *name, char *text) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", folder(), name);
    int file = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t size = file < 0 ? -1 : read(file, text, MAX_TEXT - 1);
    if (file >= 0) close(file);
    text[size < 0 ? 0 : size] = 0;
    return size > 0;
}

static const char *value_of(const char *object, const char *end, const char *key) {
    char quoted[64];
    snprintf(quoted, sizeof quoted, "\"%s\"", key);
    const char *at = strstr(object, quoted);
    if (!at || at >= end) return NULL;
    at += strlen(quoted);
    while (at < end && (*at == ':' || isspace((unsigned char)*at))) at++;
    return at;
}

static u64 number_of(const char *object, const char *end, const char *key) {
    const char *at = value_of(object, end, key);
    return at ? strtoull(at, NULL, 10) : 0;
}

static void text_of(const char *object, const char *end, const char *key, char *into, size_t size) {
    const char *at = value_of(object, end, key);
    size_t used = 0;
    if (at && *at == '"')
        for (at++; at < end && *at != '"' && used + 1 < size; at++) into[used++] = *at;
    into[used] = 0;
}

static const char *setting(const char *name) {  /* the rest of its line in `driver`, or NULL */
    size_t length = strlen(name);
    for (const char *line = driver; line && *line; line = strchr(line, '\n'), line = line ? line + 1 : NULL)
        if (!strncmp(line, name, length) && line[length] == ' ') return line + length + 1;
    return NULL;
}

static long number_setting(const char *name) {
    const char *value = setting(name);
    return value ? strtol(value, NULL, 10) : 0;
}

static int nth_number(const char *line, int wanted, int *number) {  /* of a line of numbers */
    for (int n = 0; line && *line && *line != '\n'; n++) {
        char *end;
        long found = strtol(line, &end, 10);
        if (end == line) return 0;
        if (n == wanted) return *number = (int)found, 1;
        line = end;
    }
    return 0;
}

static int is_alive(int pid) {
    char path[64], text[1024];
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) return 0;
    ssize_t size = read(file, text, sizeof text - 1);
    close(file);
    if (size <= 0) return 0;
    text[size] = 0;
    const char *state = strrchr(text, ')');
    return state && state[1] && state[2] != 'Z' && state[2] != 'X';
}

static void read_devices(void) {
    static char text[MAX_TEXT];
    device_count = 0;
    if (!read_file("devices.json", text)) return;
    for (const char *object = strchr(text, '{'); object && device_count < MAX_DEVICES; object = strchr(object + 1, '{')) {
        const char *end = strchr(object, '}');
        if (!end) return;
        Device *device = &devices[device_count++];
        device->index = (int)number_of(object, end, "index");
        device->total = number_of(object, end, "total_bytes");
        device->reserved = number_of(object, end, "reserved_bytes");
        device->used = 0;
        text_of(object, end, "uuid", device->uuid, sizeof device->uuid);
        text_of(object, end, "name", device->name, sizeof device->name);
        if (!*device->uuid)
            snprintf(device->uuid, sizeof device->uuid, "GPU-00000000-0000-0000-0000-%012d", device->index);
        if (!*device->name) strcpy(device->name, "NVIDIA Simulated GPU");
    }
}

static void read_holding(const char *name, int ended) {
    static char text[MAX_TEXT];
    if (holding_count == MAX_HOLDINGS || !read_file(name, text)) return;
    const char *end = text + strlen(text);
    Holding *holding = &holdings[holding_count];
    holding->pid = (int)number_of(text, end, "pid");
    holding->bytes = number_of(text, end, "memory_bytes");
    holding->ended = ended;
    holding->count = 0;
    const char *always = value_of(text, end, "always");
    if (!ended && !(always && !strncmp(always, "true", 4)) && !is_alive(holding->pid)) {
        if (number_setting("frees_late_ms") <= 0) return;
        char from[4096], to[4096];      /* it has just ended, as far as anybody knows: say so, and count it on */
        snprintf(from, sizeof from, "%s/%s", folder(), name);
        snprintf(to, sizeof to, "%s/%d.dead", folder(), holding->pid);
        utimensat(AT_FDCWD, from, NULL, 0);
        rename(from, to);
        holding->ended = 1;
    }
    const char *list = value_of(text, end, "devices");
    for (const char *at = list ? strpbrk(list, "[") : NULL; at && *at && *at != ']' && holding->count < MAX_DEVICES;) {
        at++;
        while (isspace((unsigned char)*at)) at++;
        if (!isdigit((unsigned char)*at)) break;
        holding->devices[holding->count++] = (int)strtol(at, (char **)&at, 10);
    }
    holding_count++;
}

static void read_holdings(void) {
    holding_count = 0;
    DIR *directory = opendir(folder());
    if (!directory) return;
    for (struct dirent *entry; (entry = readdir(directory));) {
        const char *suffix = strrchr(entry->d_name, '.');
        if (!suffix || !isdigit((unsigned char)entry->d_name[0])) continue;
        if (!strcmp(suffix, ".json")) {
            read_holding(entry->d_name, 0);
        } else if (!strcmp(suffix, ".dead")) {
            struct stat status;
            struct timespec now;
            clock_gettime(CLOCK_REALTIME, &now);
            if (fstatat(dirfd(directory), entry->d_name, &status, 0)) continue;
            long age_ms = (now.tv_sec - status.st_mtim.tv_sec) * 1000 + (now.tv_nsec - status.st_mtim.tv_nsec) / 1000000;
            if (age_ms < number_setting("frees_late_ms")) read_holding(entry->d_name, 1);
        }
    }
    closedir(directory);
}

static void note_overcommitted(const Device *device) {
    char path[4096];
    snprintf(path, sizeof path, "%s/overcommitted", folder());
    FILE *file = fopen(path, "ae");
    if (!file) return;
    fprintf(file, "device %d: %llu bytes held of %llu, as NVML sees it\n", device->index, device->used,
            device->total - device->reserved);
    fclose(file);
}

static struct timespec last;

/* A driver has its devices open; this one reads files, and keeps descriptors for it while its process has none left. */
static int spares[3] = {-1, -1, -1};

static int take_spares(void) {
    int all = 1;
    for (int n = 0; n < 3; n++) {
        if (spares[n] < 0) spares[n] = open("/dev/null", O_RDONLY | O_CLOEXEC);
        all &= spares[n] >= 0;
    }
    return all;
}

static void free_spares(void) {
    for (int n = 0; n < 3; n++) {
        if (spares[n] >= 0) close(spares[n]);
        spares[n] = -1;
    }
}

static void look(void) {    /* at most every 2 ms, for one reading asks many questions: the first is how many there are */
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    long passed_us = (now.tv_sec - last.tv_sec) * 1000000 + (now.tv_nsec - last.tv_nsec) / 1000;
    if (last.tv_sec && passed_us < 2000) return;
    if (!take_spares()) return;     /* what was seen last is told again */
    free_spares();
    char path[4096];
    snprintf(path, sizeof path, "%s/lock", folder());
    int held = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (held >= 0) flock(held, LOCK_SH);    /* nobody claims meanwhile what another gave back after it was counted */
    read_file("driver", driver);
    read_devices();
    read_holdings();
    if (held >= 0) close(held);
    take_spares();
    clock_gettime(CLOCK_MONOTONIC, &last);
    for (int n = 0; n < holding_count; n++) {
        /* one that ended while the folder was read may stand there twice: it counts once */
        int twice = 0;
        for (int m = 0; holdings[n].ended && m < holding_count; m++)
            twice |= m != n && holdings[m].pid == holdings[n].pid && (!holdings[m].ended || m < n);
        for (int d = 0; d < device_count && !twice; d++)
            for (int k = 0; k < holdings[n].count; k++)
                if (holdings[n].devices[k] == devices[d].index) devices[d].used += holdings[n].bytes;
    }
    for (int d = 0; d < device_count; d++)
        if (devices[d].used > devices[d].total - devices[d].reserved) note_overcommitted(&devices[d]);
}

/* --- NVML --- */

static int enter(void) {    /* the lock is held when it returns */
    pthread_mutex_lock(&lock);
    look();
    if (number_setting("slow_ms") > 0) {
        struct timespec pause = {number_setting("slow_ms") / 1000, number_setting("slow_ms") % 1000 * 1000000};
        nanosleep(&pause, NULL);
    }
    if (!initialised) return UNINITIALIZED;
    if (number_setting("down")) return DRIVER_NOT_LOADED;
    return number_setting("epoch") == epoch_then ? SUCCESS : UNKNOWN;
}

static int leave(int code) {
    pthread_mutex_unlock(&lock);
    return code;
}

static int is_in(const char *name, int index) {
    int number;
    for (int n = 0; nth_number(setting(name), n, &number); n++)
        if (number == index) return 1;
    return 0;
}

static int at(void *handle, Device **device) {  /* the lock is held when it returns */
    int code = enter();
    for (int d = 0; code == SUCCESS && d < device_count; d++)
        if (devices[d].index == (int)(size_t)handle - 1) {
            *device = &devices[d];
            return is_in("lost", devices[d].index) ? GPU_IS_LOST : SUCCESS;
        }
    return code == SUCCESS ? GPU_IS_LOST : code;
}

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    pthread_mutex_lock(&lock);
    look();
    if (number_setting("down")) return leave(DRIVER_NOT_LOADED);
    if (!initialised) epoch_then = (int)number_setting("epoch");
    initialised++;
    return leave(SUCCESS);
}

int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }

int nvmlShutdown(void) {
    pthread_mutex_lock(&lock);
    if (!initialised) return leave(UNINITIALIZED);
    initialised--;
    return leave(SUCCESS);
}

int nvmlDeviceGetCount_v2(unsigned *count) {
    pthread_mutex_lock(&lock);
    last.tv_sec = 0;
    pthread_mutex_unlock(&lock);
    int code = enter();
    *count = (unsigned)device_count;
    return leave(code);
}

int nvmlDeviceGetHandleByIndex_v2(unsigned position, void **handle) {
    int code = enter(), index;
    if (code != SUCCESS) return leave(code);
    if (position >= (unsigned)device_count) return leave(INVALID_ARGUMENT);
    if (!nth_number(setting("order"), (int)position, &index)) index = devices[position].index;
    *handle = (void *)(size_t)(index + 1);
    return leave(is_in("lost", index) ? GPU_IS_LOST : SUCCESS);
}

static int copy(int code, const char *text, char *into, unsigned size) {
    if (code == SUCCESS && strlen(text) >= size) code = INSUFFICIENT_SIZE;
    if (code == SUCCESS) strcpy(into, text);
    return leave(code);
}

int nvmlDeviceGetUUID(void *handle, char *text, unsigned size) {
    Device *device = NULL;
    int code = at(handle, &device);
    return copy(code, device ? device->uuid : "", text, size);
}

int nvmlDeviceGetName(void *handle, char *text, unsigned size) {
    Device *device = NULL;
    int code = at(handle, &device);
    return copy(code, device ? device->name : "", text, size);
}

int nvmlDeviceGetMigMode(void *handle, unsigned *current, unsigned *pending) {
    Device *device;
    int code = at(handle, &device);
    *current = *pending = code == SUCCESS && is_in("mig", device->index);
    return leave(code);
}

int nvmlDeviceGetMemoryInfo(void *handle, u64 *info) {  /* total, free, used: what the driver reserves counts as used */
    Device *device;
    int code = at(handle, &device);
    if (code != SUCCESS) return leave(code);
    info[0] = device->total;
    info[2] = device->used + device->reserved;
    info[1] = info[2] > device->total ? 0 : device->total - info[2];
    return leave(SUCCESS);
}

typedef struct { unsigned version; u64 total, reserved, free, used; } MemoryV2;

int nvmlDeviceGetMemoryInfo_v2(void *handle, MemoryV2 *info) {
    Device *device;
    int code = at(handle, &device);
    if (code == SUCCESS && number_setting("old")) code = FUNCTION_NOT_FOUND;
    if (code == SUCCESS && info->version != 0x02000028) code = INVALID_ARGUMENT;
    if (code != SUCCESS) return leave(code);
    u64 taken = device->used + device->reserved;
    info->total = device->total;
    info->reserved = device->reserved;
    info->used = device->used;
    info->free = taken > device->total ? 0 : device->total - taken;
    return leave(SUCCESS);
}

int nvmlDeviceGetUtilizationRates(void *handle, unsigned *rates) {
    Device *device;
    int code = at(handle, &device);
    rates[0] = code == SUCCESS && device->used ? 35 : 0;
    rates[1] = 0;
    return leave(code);
}

int nvmlDeviceGetTemperature(void *handle, unsigned sensor, unsigned *celsius) {
    Device *device;
    int code = at(handle, &device);
    *celsius = 41;
    return leave(code == SUCCESS && sensor ? INVALID_ARGUMENT : code);
}

static int processes(void *handle, unsigned *count, Process *list, int version) {
    Device *device;
    int code = at(handle, &device);
    const char *shown = setting("processes");
    if (code == SUCCESS && version == 3 && number_setting("old")) code = FUNCTION_NOT_FOUND;
    if (code == SUCCESS && shown && !strncmp(shown, "none", 4)) code = NOT_SUPPORTED;
    if (code != SUCCESS) return leave(code);
    unsigned found = 0, room = *count;
    for (int n = 0; n < holding_count; n++)
        for (int k = 0; k < holdings[n].count; k++) {
            if (holdings[n].ended || holdings[n].devices[k] != device->index) continue;
            if (list && found < room) {
                list[found].pid = (unsigned)(holdings[n].pid + number_setting("pid_offset"));
                list[found].used = shown && !strncmp(shown, "no_memory", 9) ? ~0ULL : holdings[n].bytes;
                list[found].gpu_instance = list[found].compute_instance = ~0U;
            }
            found++;
        }
    *count = found;
    return leave(found > room || (found && !list) ? INSUFFICIENT_SIZE : SUCCESS);
}

int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned *count, Process *list) {
    return processes(handle, count, list, 3);
}

int nvmlDeviceGetComputeRunningProcesses_v2(void *handle, unsigned *count, Process *list) {
    return processes(handle, count, list, 2);
}

int nvmlSystemGetDriverVersion(char *text, unsigned size) {
    int code = enter();
    return copy(code, number_setting("epoch") ? "580.65.06" : "570.86.15", text, size);
}

int nvmlSystemGetCudaDriverVersion(int *version) {
    int code = enter();
    *version = 12080;
    return leave(code);
}

const char *nvmlErrorString(int code) {
    switch (code) {
        case SUCCESS: return "The operation was successful";
        case UNINITIALIZED: return "Uninitialized";
        case INVALID_ARGUMENT: return "Invalid Argument";
        case NOT_SUPPORTED: return "Not Supported";
        case NOT_FOUND: return "Not Found";
        case INSUFFICIENT_SIZE: return "Insufficient Size";
        case DRIVER_NOT_LOADED: return "Driver Not Loaded";
        case FUNCTION_NOT_FOUND: return "Function Not Found";
        case GPU_IS_LOST: return "GPU is lost";
        default: return "Unknown Error";
    }
}
