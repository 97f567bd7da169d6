/* Counts the bytes of large heap blocks of a process. Loaded with LD_PRELOAD; read through ctypes.
 *
 * Every block whose usable size is at least KEEPLESS_MIN_BLOCK bytes is counted, by its usable size; smaller ones
 * (Python objects, mostly) are not. Python's arenas come from mmap and are not seen. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

#define KEEPLESS_MIN_BLOCK 4096

static _Atomic int64_t current_nbytes;
static _Atomic int64_t peak_nbytes;

static void *(*real_malloc)(size_t);
static void *(*real_calloc)(size_t, size_t);
static void *(*real_realloc)(void *, size_t);
static void (*real_free)(void *);
static int (*real_posix_memalign)(void **, size_t, size_t);
static void *(*real_aligned_alloc)(size_t, size_t);
static void *(*real_memalign)(size_t, size_t);
static void *(*real_valloc)(size_t);
static void *(*real_pvalloc)(size_t);

/* dlsym may itself allocate before the real functions are known: those few blocks come from here and are never freed. */
static _Alignas(64) char early_pool[1 << 16];
static _Atomic size_t early_used;
static _Thread_local int resolving __attribute__((tls_model("initial-exec")));

static int is_early(const void *block) {
    return (const char *)block >= early_pool && (const char *)block < early_pool + sizeof early_pool;
}

static void *early_alloc(size_t alignment, size_t nbytes) {
    if (alignment < 64) alignment = 64;
    size_t size = ((nbytes + 63) & ~(size_t)63) + alignment;
    size_t start = atomic_fetch_add(&early_used, size);
    if (start + size > sizeof early_pool) {
        static const char message[] = "keepless interposer: early pool exhausted\n";
        ssize_t ignored = write(2, message, sizeof message - 1);
        (void)ignored;
        _exit(97);
    }
    uintptr_t address = (uintptr_t)(early_pool + start);
    return (void *)((address + alignment - 1) & ~(uintptr_t)(alignment - 1));
}

static int resolve(void) {
    if (real_pvalloc) return 1;
    if (resolving) return 0;
    resolving = 1;
    real_malloc = (void *(*)(size_t))dlsym(RTLD_NEXT, "malloc");
    real_calloc = (void *(*)(size_t, size_t))dlsym(RTLD_NEXT, "calloc");
    real_realloc = (void *(*)(void *, size_t))dlsym(RTLD_NEXT, "realloc");
    real_free = (void (*)(void *))dlsym(RTLD_NEXT, "free");
    real_posix_memalign = (int (*)(void **, size_t, size_t))dlsym(RTLD_NEXT, "posix_memalign");
    real_aligned_alloc = (void *(*)(size_t, size_t))dlsym(RTLD_NEXT, "aligned_alloc");
    real_memalign = (void *(*)(size_t, size_t))dlsym(RTLD_NEXT, "memalign");
    real_valloc = (void *(*)(size_t))dlsym(RTLD_NEXT, "valloc");
    real_pvalloc = (void *(*)(size_t))dlsym(RTLD_NEXT, "pvalloc");
    resolving = 0;
    return 1;
}

__attribute__((constructor)) static void start(void) { resolve(); }

static void add(int64_t nbytes) {
    int64_t now = atomic_fetch_add(&current_nbytes, nbytes) + nbytes;
    int64_t seen = atomic_load(&peak_nbytes);
    while (now > seen && !atomic_compare_exchange_weak(&peak_nbytes, &seen, now)) {
    }
}

static void *counted(void *block) {
    if (block) {
        size_t nbytes = malloc_usable_size(block);
        if (nbytes >= KEEPLESS_MIN_BLOCK) add((int64_t)nbytes);
    }
    return block;
}

static size_t countable(void *block) {
    size_t nbytes = block ? malloc_usable_size(block) : 0;
    return nbytes >= KEEPLESS_MIN_BLOCK ? nbytes : 0;
}

void *malloc(size_t nbytes) { return resolve() ? counted(real_malloc(nbytes)) : early_alloc(64, nbytes); }

void *calloc(size_t count, size_t nbytes) {
    if (resolve()) return counted(real_calloc(count, nbytes));
    size_t total;
    if (__builtin_mul_overflow(count, nbytes, &total)) return NULL;
    return early_alloc(64, total); /* static memory: zero already */
}

void free(void *block) {
    if (!block || is_early(block)) return;
    if (!resolve()) return;
    size_t nbytes = countable(block);
    if (nbytes) atomic_fetch_sub(&current_nbytes, (int64_t)nbytes);
    int saved = errno; /* free keeps errno */
    real_free(block);
    errno = saved;
}

void *realloc(void *block, size_t nbytes) {
    if (!resolve()) {
        void *fresh = early_alloc(64, nbytes);
        if (block) memcpy(fresh, block, nbytes);
        return fresh;
    }
    if (block && is_early(block)) {
        void *fresh = counted(real_malloc(nbytes));
        size_t readable = (size_t)(early_pool + sizeof early_pool - (char *)block);
        if (fresh) memcpy(fresh, block, nbytes < readable ? nbytes : readable);
        return fresh;
    }
    /* Old and new may be alive at once inside, or pages may move: only the balance is counted. */
    size_t before = countable(block);
    void *fresh = real_realloc(block, nbytes);
    if (fresh || nbytes == 0) {
        if (before) atomic_fetch_sub(&current_nbytes, (int64_t)before);
        counted(fresh);
    }
    return fresh;
}

int posix_memalign(void **out, size_t alignment, size_t nbytes) {
    if (!resolve()) {
        *out = early_alloc(alignment, nbytes);
        return 0;
    }
    int failed = real_posix_memalign(out, alignment, nbytes);
    if (!failed) counted(*out);
    return failed;
}

void *aligned_alloc(size_t alignment, size_t nbytes) {
    return resolve() ? counted(real_aligned_alloc(alignment, nbytes)) : early_alloc(alignment, nbytes);
}

void *memalign(size_t alignment, size_t nbytes) {
    return resolve() ? counted(real_memalign(alignment, nbytes)) : early_alloc(alignment, nbytes);
}

void *valloc(size_t nbytes) { return resolve() ? counted(real_valloc(nbytes)) : early_alloc(4096, nbytes); }

void *pvalloc(size_t nbytes) {
    return resolve() ? counted(real_pvalloc(nbytes)) : early_alloc(4096, (nbytes + 4095) & ~(size_t)4095);
}

int64_t keepless_current(void) { return atomic_load(&current_nbytes); }

int64_t keepless_peak(void) { return atomic_load(&peak_nbytes); }

void keepless_reset_peak(void) { atomic_store(&peak_nbytes, atomic_load(&current_nbytes)); }
