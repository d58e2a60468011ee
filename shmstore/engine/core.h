/* The operations of an arena on the path of a request, in C. No Python here: module.c is the interface to Python. */

#ifndef SHMSTORE_CORE_H
#define SHMSTORE_CORE_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__ || UINTPTR_MAX != UINT64_MAX
#error "records are little-endian and cells have 64 bits: this machine uses the Python engine"
#endif

/* CORE_PORTABLE, for tests: what is compiled on other machines. */
#if defined(__x86_64__) && !defined(CORE_PORTABLE)
#define CORE_X86
#endif

/* What an operation did. Negative: it changed nothing in the session, and Python does the whole operation. */
enum {
    CORE_NO = 0,          /* done: the session is absent, or present where it must be absent */
    CORE_OK = 1,          /* done; put and change: plus how many live sessions they evicted */
    CORE_BUSY = -1,       /* the lock is taken, or the slot changes */
    CORE_DUE = -2,        /* a dispose may have to be called */
    CORE_DECLINED = -3,   /* a limit of an owner, an option, a half-done mutation, damage: rare, whatever it is */
    CORE_CHANGED = -4,    /* the session is not what the caller has read */
    CORE_LONG = -5,       /* core_read: the record does not fit in the buffer; the entry has its length */
};

/* Grows with each change of what a call takes, returns or does: see core.py. */
enum { CORE_VERSION = 4 };

/* Layout, see layout.py and header.py; the names are the same. */
enum { CORE_CELL = 8, CORE_HEAD = 40, CORE_OVERHEAD = 44, CORE_RUN = 128, CORE_TOMBSTONE_WAYS = 32 };

struct core_key {
    uint64_t low, high;
};

struct core {
    _Atomic uint64_t *cells;
    pthread_mutex_t *mutex;
    /* Where the mutex counts how often its owner has locked it, and that number when it is locked once. */
    const uint32_t *depth;
    uint32_t locked_once;
    /* Geometry: constant, from the checksummed header, and checked against the size of the memory. */
    uint64_t slots, blocks, block_size, shortest, buckets, owner_buckets, tombstone_sets;
    /* The first cell of each region, and the cells of a block. */
    uint64_t first_slot, first_bucket, first_owner, first_tombstone, first_block, step;
    uint64_t last_slot, owned_list;
    /* This process. */
    uint64_t row;     /* the cell of its row of counters; 0: it has none yet */
    uint64_t evicted; /* live sessions evicted by a call that Python had to complete */
};

struct core_entry {
    uint64_t slot, version, expires, used, length;
};

/* A record that is written: `length` bytes, in words. */
struct core_record {
    const uint64_t *words;
    uint64_t length;
    uint32_t weight;
    uint64_t owner;
};

struct core_exchange {
    uint64_t slot, version;
    struct core_key old_key, new_key;
    uint64_t span;
    bool keeps_deadline, tombstone;
    uint64_t count; /* the cell that counts it */
};

enum { CORE_NUMBERS = 48 };
extern const uint64_t core_interface[CORE_NUMBERS];

bool core_fits(const struct core *core, uint64_t cells);
struct core_key core_key_of(const uint8_t *name, uint64_t length);
uint64_t core_owner_digest(const uint8_t *owner, uint64_t length);
uint32_t core_crc32(const uint64_t *words, uint64_t length);
uint64_t core_capacity(uint64_t length);
void core_seal(
    uint64_t *words, struct core_key key, uint64_t owner, uint64_t created, uint32_t weight, uint64_t length);
void core_prefetch(const struct core *core, struct core_key key);
int core_read(struct core *core, struct core_key key, struct core_entry *entry, uint64_t *buffer, uint64_t room);
int core_use(struct core *core, const struct core_entry *entry, uint64_t now);
bool core_count_in(struct core *core, uint64_t row);
void core_count_read(struct core *core, bool hit);
bool core_allows(const struct core *core, uint64_t payload);
int core_put(
    struct core *core, struct core_key key, const struct core_record *record, int present, uint64_t span, uint64_t now);
int core_exchange(
    struct core *core, const struct core_exchange *change, const struct core_record *record, uint64_t now);
int core_touch(struct core *core, struct core_key key, uint64_t span, uint64_t now);
int core_drop(struct core *core, struct core_key key, bool tombstone, uint64_t now);

#endif
