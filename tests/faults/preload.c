/* Calls of libc on files, failed or recorded on request; loaded by LD_PRELOAD.

   Only calls on files in one folder count. `faults_fail` makes the n-th call of a kind fail;
   `faults_record` writes every change to a file, from which a power cut can be replayed. Both are
   called by ctypes in the process itself, so that a process can be prepared first. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OPEN, WRITE, FLUSH, RENAME, UNLINK, STAT, MKDIR, KINDS };
#define SHORT_WRITE (-1)

static char folder[PATH_MAX];
static int failing_kind = -1, failing_call, failing_error, failing_on;
/* Shared with forked processes: the number of calls of each kind, then whether one has failed. */
static atomic_int *counts;
static int record_fd = -1, trace_fd = -1;
static pthread_mutex_t recording = PTHREAD_MUTEX_INITIALIZER;

#define REAL(name) \
  static __typeof__(name) *real; \
  if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

__attribute__((constructor)) static void share_counts(void) {
  size_t size = (KINDS + 1) * sizeof(atomic_int);
  counts = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
}

void faults_watch(const char *path) { snprintf(folder, sizeof folder, "%s", path); }

/* error: an errno, or SHORT_WRITE. on: whether the calls after the n-th fail too. */
void faults_fail(int kind, int call, int error, int on) {
  failing_kind = kind, failing_call = call, failing_error = error, failing_on = on;
}

void faults_record(const char *path) {
  record_fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
}

/* One line for each call that counts: kind, its number, path. */
void faults_trace(const char *path) {
  trace_fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC, 0600);
}

int faults_count(int kind) { return counts[kind]; }

void faults_reset(void) {
  for (int i = 0; i <= KINDS; i++) counts[i] = 0;
}

/* Write the absolute path of `path` relative to `at` into `out`; return whether it is watched. */
static int watched(int at, const char *path, char *out) {
  if (!folder[0] || !path) return 0;
  char base[PATH_MAX] = "";
  if (path[0] != '/') {
    if (at == AT_FDCWD) {
      if (!getcwd(base, sizeof base)) return 0;
    } else {
      char link[64];
      snprintf(link, sizeof link, "/proc/self/fd/%d", at);
      ssize_t n = readlink(link, base, sizeof base - 1);
      if (n < 0) return 0;
      base[n] = 0;
    }
  }
  int n;
  if (!path[0]) n = snprintf(out, PATH_MAX, "%s", base);
  else if (base[0]) n = snprintf(out, PATH_MAX, "%s/%s", base, path);
  else n = snprintf(out, PATH_MAX, "%s", path);
  size_t length = strlen(folder);
  return n < PATH_MAX && !strncmp(out, folder, length) && (out[length] == '/' || !out[length]);
}

static int watched_fd(int fd, char *out) { return fd != record_fd && watched(fd, "", out); }

/* Count a call; return 0, or how it must fail. */
static int fault(int kind, const char *path) {
  int call = atomic_fetch_add(&counts[kind], 1);
  if (trace_fd >= 0) dprintf(trace_fd, "%d\t%d\t%s\n", kind, call, path);
  if (kind != failing_kind) return 0;
  if (call != failing_call && !(failing_on && call > failing_call)) return 0;
  counts[KINDS] = 1;
  return failing_error;
}

#define FAIL_IF(condition, kind, path) \
  do { \
    int error_ = (condition) ? fault(kind, path) : 0; \
    if (error_ > 0) { errno = error_; return -1; } \
  } while (0)

/* One record: kind, then two paths, offset and size, then the bytes. */
static void record(char kind, const char *path, const char *other, long offset, const void *data,
                   size_t size) {
  char head[2 * PATH_MAX + 64];
  int n = snprintf(head, sizeof head, "%c\t%s\t%s\t%ld\t%zu\n", kind, path, other, offset, size);
  struct iovec parts[] = {{head, n}, {(void *)data, size}};
  REAL(writev);
  if (real(record_fd, parts, 2) != (ssize_t)(n + size)) abort();
}

/* Run a call and record its success, one thread at a time. */
#define RECORDED(is_watched, call, on_success) \
  do { \
    if (record_fd < 0 || !(is_watched)) return call; \
    pthread_mutex_lock(&recording); \
    __typeof__(call) result = call; \
    int error_ = errno; \
    if (result >= 0) { on_success; } \
    pthread_mutex_unlock(&recording); \
    errno = error_; \
    return result; \
  } while (0)

static int open_at(int at, const char *path, int flags, mode_t mode) {
  static int (*real)(int, const char *, int, ...);
  if (!real) real = (int (*)(int, const char *, int, ...))dlsym(RTLD_NEXT, "openat64");
  char full[PATH_MAX];
  int is_watched = watched(at, path, full);
  FAIL_IF(is_watched, OPEN, full);
  int creates = flags & (O_CREAT | O_TRUNC);
  RECORDED(is_watched && creates, real(at, path, flags, mode),
           record(flags & O_TRUNC ? 't' : 'c', full, "", 0, "", 0));
}

#define OPEN_MODE(flags) \
  mode_t mode = 0; \
  if ((flags) & (O_CREAT | O_TMPFILE)) { \
    va_list rest; \
    va_start(rest, flags); \
    mode = va_arg(rest, mode_t); \
    va_end(rest); \
  }

int open(const char *path, int flags, ...) { OPEN_MODE(flags); return open_at(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { OPEN_MODE(flags); return open_at(AT_FDCWD, path, flags, mode); }
int openat(int at, const char *path, int flags, ...) { OPEN_MODE(flags); return open_at(at, path, flags, mode); }
int openat64(int at, const char *path, int flags, ...) { OPEN_MODE(flags); return open_at(at, path, flags, mode); }
int __open_2(const char *path, int flags) { return open_at(AT_FDCWD, path, flags, 0); }
int __open64_2(const char *path, int flags) { return open_at(AT_FDCWD, path, flags, 0); }
int __openat_2(int at, const char *path, int flags) { return open_at(at, path, flags, 0); }
int __openat64_2(int at, const char *path, int flags) { return open_at(at, path, flags, 0); }
int creat(const char *path, mode_t mode) { return open_at(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }

static ssize_t shorter(ssize_t size) { return size > 1 ? size / 2 : size; }

ssize_t write(int fd, const void *data, size_t size) {
  REAL(write);
  char path[PATH_MAX];
  int is_watched = watched_fd(fd, path);
  int error = is_watched ? fault(WRITE, path) : 0;
  if (error > 0) { errno = error; return -1; }
  if (error == SHORT_WRITE) size = shorter(size);
  RECORDED(is_watched, real(fd, data, size),
           record('w', path, "", lseek(fd, 0, SEEK_CUR) - result, data, result));
}

static ssize_t write_at(int fd, const void *data, size_t size, off_t offset) {
  static ssize_t (*real)(int, const void *, size_t, off_t);
  if (!real) real = (ssize_t(*)(int, const void *, size_t, off_t))dlsym(RTLD_NEXT, "pwrite64");
  char path[PATH_MAX];
  int is_watched = watched_fd(fd, path);
  int error = is_watched ? fault(WRITE, path) : 0;
  if (error > 0) { errno = error; return -1; }
  if (error == SHORT_WRITE) size = shorter(size);
  RECORDED(is_watched, real(fd, data, size, offset), record('w', path, "", offset, data, result));
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) { return write_at(fd, data, size, offset); }
ssize_t pwrite64(int fd, const void *data, size_t size, off_t offset) { return write_at(fd, data, size, offset); }

/* As one write of all parts, which may be short as well. */
static ssize_t write_parts(int fd, const struct iovec *parts, int n, off_t offset) {
  size_t size = 0;
  for (int i = 0; i < n; i++) size += parts[i].iov_len;
  char *joined = malloc(size + 1), *end = joined;
  for (int i = 0; i < n; i++) end = mempcpy(end, parts[i].iov_base, parts[i].iov_len);
  ssize_t result = offset < 0 ? write(fd, joined, size) : write_at(fd, joined, size, offset);
  int error = errno;
  free(joined);
  errno = error;
  return result;
}

ssize_t writev(int fd, const struct iovec *parts, int n) {
  REAL(writev);
  char path[PATH_MAX];
  if (!watched_fd(fd, path)) return real(fd, parts, n);
  return write_parts(fd, parts, n, -1);
}
ssize_t pwritev(int fd, const struct iovec *parts, int n, off_t offset) {
  REAL(pwritev);
  char path[PATH_MAX];
  if (!watched_fd(fd, path)) return real(fd, parts, n, offset);
  return write_parts(fd, parts, n, offset);
}
ssize_t pwritev64(int fd, const struct iovec *parts, int n, off_t offset) { return pwritev(fd, parts, n, offset); }

/* NumPy writes arrays by this. Inside libc it does not call `write` above. */
size_t fwrite(const void *data, size_t size, size_t n, FILE *file) {
  REAL(fwrite);
  char path[PATH_MAX];
  if (!size || !n || !watched_fd(fileno(file), path)) return real(data, size, n, file);
  int error = fault(WRITE, path);
  if (error > 0) { errno = error; return 0; }
  if (error == SHORT_WRITE) n = shorter(n);
  if (record_fd < 0) return real(data, size, n, file);
  pthread_mutex_lock(&recording);
  fflush(file);
  off_t offset = lseek(fileno(file), 0, SEEK_CUR);
  size_t result = real(data, size, n, file);
  fflush(file);
  record('w', path, "", offset, data, result * size);
  pthread_mutex_unlock(&recording);
  return result;
}

/* Python then copies by write. */
ssize_t sendfile(int out, int in, off_t *offset, size_t size) {
  REAL(sendfile);
  char path[PATH_MAX];
  if (watched_fd(out, path)) { errno = EINVAL; return -1; }
  return real(out, in, offset, size);
}
ssize_t sendfile64(int out, int in, off_t *offset, size_t size) { return sendfile(out, in, offset, size); }

static int truncate_fd(int fd, off_t size) {
  static int (*real)(int, off_t);
  if (!real) real = (int (*)(int, off_t))dlsym(RTLD_NEXT, "ftruncate64");
  char path[PATH_MAX];
  int is_watched = watched_fd(fd, path);
  FAIL_IF(is_watched, WRITE, path);
  RECORDED(is_watched, real(fd, size), record('s', path, "", size, "", 0));
}
int ftruncate(int fd, off_t size) { return truncate_fd(fd, size); }
int ftruncate64(int fd, off_t size) { return truncate_fd(fd, size); }

#define FLUSH_CALL(name) \
  int name(int fd) { \
    REAL(name); \
    char path[PATH_MAX]; \
    int is_watched = watched_fd(fd, path); \
    FAIL_IF(is_watched, FLUSH, path); \
    RECORDED(is_watched, real(fd), record('f', path, "", 0, "", 0)); \
  }
FLUSH_CALL(fsync)
FLUSH_CALL(fdatasync)

int renameat2(int at, const char *path, int new_at, const char *new_path, unsigned flags) {
  REAL(renameat2);
  char full[PATH_MAX], new_full[PATH_MAX];
  int is_watched = watched(at, path, full) && watched(new_at, new_path, new_full);
  FAIL_IF(is_watched, RENAME, full);
  RECORDED(is_watched, real(at, path, new_at, new_path, flags),
           record('r', full, new_full, 0, "", 0));
}
int rename(const char *path, const char *new_path) { return renameat2(AT_FDCWD, path, AT_FDCWD, new_path, 0); }
int renameat(int at, const char *path, int new_at, const char *new_path) { return renameat2(at, path, new_at, new_path, 0); }

int unlinkat(int at, const char *path, int flags) {
  REAL(unlinkat);
  char full[PATH_MAX];
  int is_watched = watched(at, path, full);
  FAIL_IF(is_watched, UNLINK, full);
  RECORDED(is_watched, real(at, path, flags), record('u', full, "", 0, "", 0));
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

int mkdirat(int at, const char *path, mode_t mode) {
  REAL(mkdirat);
  char full[PATH_MAX];
  int is_watched = watched(at, path, full);
  FAIL_IF(is_watched, MKDIR, full);
  RECORDED(is_watched, real(at, path, mode), record('d', full, "", 0, "", 0));
}
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

#define STAT_CALL(name, type) \
  int name(const char *path, struct type *out) { \
    REAL(name); \
    char full[PATH_MAX]; \
    FAIL_IF(watched(AT_FDCWD, path, full), STAT, full); \
    return real(path, out); \
  }
STAT_CALL(stat, stat)
STAT_CALL(lstat, stat)
STAT_CALL(stat64, stat64)
STAT_CALL(lstat64, stat64)

#define STAT_FD_CALL(name, type) \
  int name(int fd, struct type *out) { \
    REAL(name); \
    char full[PATH_MAX]; \
    FAIL_IF(watched_fd(fd, full), STAT, full); \
    return real(fd, out); \
  }
STAT_FD_CALL(fstat, stat)
STAT_FD_CALL(fstat64, stat64)

#define STAT_AT_CALL(name, type) \
  int name(int at, const char *path, struct type *out, int flags) { \
    REAL(name); \
    char full[PATH_MAX]; \
    FAIL_IF(watched(at, path, full), STAT, full); \
    return real(at, path, out, flags); \
  }
STAT_AT_CALL(fstatat, stat)
STAT_AT_CALL(fstatat64, stat64)

int statx(int at, const char *path, int flags, unsigned mask, struct statx *out) {
  REAL(statx);
  char full[PATH_MAX];
  FAIL_IF(watched(at, path, full), STAT, full);
  return real(at, path, flags, mask, out);
}
