// Preloaded into a process: makes one allocation of malloc's family fail, or all from one on.
#include <errno.h>
#include <limits.h>
#include <stdatomic.h>
#include <stddef.h>

// glibc's own, whatever is preloaded.
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);

// While armed, allocations of at least min_size bytes are counted from 0; [first, last) fail.
static atomic_int armed;
static atomic_long count, first, last;
static atomic_size_t min_size;

void failing_malloc_arm(long first_failing, long failures, size_t bytes) {
  count = 0;
  first = first_failing;
  last = failures < LONG_MAX - first_failing ? first_failing + failures : LONG_MAX;
  min_size = bytes;
  armed = 1;
}

// Allocations counted since failing_malloc_arm, the failed ones included.
long failing_malloc_disarm(void) {
  armed = 0;
  return count;
}

static int fails(size_t size) {
  if (!armed || size < min_size) return 0;
  const long i = count++;
  if (i < first || i >= last) return 0;
  errno = ENOMEM;
  return 1;
}

void* malloc(size_t size) { return fails(size) ? NULL : __libc_malloc(size); }

void* calloc(size_t n, size_t size) { return fails(n * size) ? NULL : __libc_calloc(n, size); }

void* realloc(void* p, size_t size) { return fails(size) ? NULL : __libc_realloc(p, size); }

void* memalign(size_t alignment, size_t size) {
  return fails(size) ? NULL : __libc_memalign(alignment, size);
}

void* aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }

int posix_memalign(void** out, size_t alignment, size_t size) {
  void* p = memalign(alignment, size);
  if (p == NULL) return ENOMEM;
  *out = p;
  return 0;
}
