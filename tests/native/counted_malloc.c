// Counts what is allocated, and its peak since the last reset; to be preloaded. Over glibc's own functions, so that
// loading it needs no memory.

#include <errno.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>

void* __libc_malloc(size_t size);
void* __libc_memalign(size_t alignment, size_t size);
void* __libc_realloc(void* old, size_t size);
void __libc_free(void* block);

static atomic_long current, peak;

static void* counted(void* block) {
  if (block == NULL) return block;
  const long now = atomic_fetch_add(&current, (long)malloc_usable_size(block)) + (long)malloc_usable_size(block);
  long seen = atomic_load(&peak);
  while (now > seen && !atomic_compare_exchange_weak(&peak, &seen, now)) continue;
  return block;
}

static void* uncounted(void* block) {
  if (block != NULL) atomic_fetch_sub(&current, (long)malloc_usable_size(block));
  return block;
}

void* malloc(size_t size) { return counted(__libc_malloc(size)); }

void* calloc(size_t count, size_t size) {
  void* block = __libc_malloc(count * size);
  return block == NULL ? block : memset(counted(block), 0, count * size);
}

void* realloc(void* old, size_t size) { return counted(__libc_realloc(uncounted(old), size)); }

void* memalign(size_t alignment, size_t size) { return counted(__libc_memalign(alignment, size)); }

void* aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }

int posix_memalign(void** block, size_t alignment, size_t size) {
  *block = memalign(alignment, size);
  return *block == NULL ? ENOMEM : 0;
}

void free(void* block) { __libc_free(uncounted(block)); }

void counted_reset(void) { atomic_store(&peak, atomic_load(&current)); }

long counted_current(void) { return atomic_load(&current); }

long counted_peak(void) { return atomic_load(&peak); }
