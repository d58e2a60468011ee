/*
 * Operations of an arena: read, put, exchange, touch, drop. The Python engine (arena.py, reader.py, journal.py,
 * store/eviction.py) is the reference. Given the same operations and the same clock, both leave the same bytes.
 *
 * An operation completes the common case, or it changes nothing and says why; then Python does the whole operation.
 * Under the lock nothing is allocated, no system call is made and Python is not called. The file is shared with other
 * processes and may be damaged, so nothing read from it is trusted: each slot and block is checked before it is used
 * as an index (`is_slot`, `is_link`, `is_block`), and each loop is bounded.
 *
 * Memory order. Only on x86-64 are there reads without the lock: see reader.py and `LOCK_FREE_READS`. The machine keeps
 * stores and loads in order there, and what follows makes the compiler do so. A store of a plan is a release store: it
 * becomes visible after all stores before it. So readers see the stores of a plan in the order of the plan. A reader is
 * a seqlock reader: it loads `version` (acquire), then the other cells and the record (relaxed), then passes an acquire
 * fence, then loads `version` again.
 *  - If it saw a cell of a plan, the fence synchronizes with that release store, and the second load sees the odd
 *    version that the plan stores before.
 *  - If it saw words of a record that is written into the blocks of its record, these blocks were freed before. The
 *    writer passes a release fence before it stores the words, and it has seen the plan that freed the blocks, through
 *    the mutex. So the second load sees the version of that plan.
 * Either way the versions differ and the read is repeated. A miss is read in the same way with STRUCTURE. The words of
 * a record are atomic and relaxed, so reading them while they change is not undefined behaviour.
 *
 * Crash order. Only the process can die, not the machine, so what counts is the order of the store instructions, which
 * the compiler chooses. `commit` says what that order is.
 */

#define _POSIX_C_SOURCE 200809L

#include "core.h"

#include <errno.h>
#include <stdatomic.h>
#include <string.h>
#include <time.h>

#ifdef CORE_X86
enum { LOCK_FREE_READS = true };
#else
enum { LOCK_FREE_READS = false };
#endif

/* The test build of the fault harness logs every store here. */
#ifndef CORE_STORED
#define CORE_STORED(cell, value)
#endif

_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2, "a cell is stored by one instruction");
_Static_assert(sizeof(_Atomic uint64_t) == CORE_CELL, "a cell has 8 bytes");

enum { KEY_LOW, KEY_HIGH, RECORD, EXPIRES, USED, VERSION, PREV, NEXT, OWNER, CHAIN, OWNER_LINKS, OWNER_HEAD, SLOT };

enum {
    STATE = 32, PENDING, STRUCTURE, TICK, SESSIONS, EARLIEST_COPY, USED_BLOCKS, TOP_SLOT, FREE_SLOT, FREE_RUN,
    EARLIEST, RECENT_EARLIEST, HAND, WEIGHT,
    SETS = 48, TOUCHES, DESTROYED, EXPIRED, EVICTED, EVICTED_OWNED,
    MAX = 64, RECENCY, TTL, MAX_SESSION, MAX_PER_OWNER, STALE, DISPOSES, DISPOSES_ON_SET,
    HAS_WEIGHTS = 80, OPTIONS_SUM = 89,
    JOURNAL = 512, JOURNAL_CELLS = 512,
    OPTION_CELLS = DISPOSES_ON_SET + 1 - MAX,
};

/* A row of counters. */
enum { ROW_HITS = 1, ROW_MISSES, ROW_WAITED, ROW_WAITS };

#define LOW UINT64_C(0xffffffff)
#define NEVER UINT64_C(0x7fffffffffffffff)
#define SECOND UINT64_C(1000000000)
#define STAMPS_AHEAD (60 * SECOND)
#define AHEAD SECOND
#define RENAMED UINT64_C(1)

enum {
    TRIES = 8,       /* of a read, before Python takes the lock for it */
    SPIN_TIME = 30000, /* nanoseconds to wait for the lock: longer than most operations of the Python engine hold it */
    HOPS = 1000,     /* along one chain: a longer one is a ring, or its ids were chosen to collide */
    BATCH = 32,      /* slots that eviction checks for an expired session */
    PLAN_PAIRS = 64, /* more than the longest plan */
    LINE = 8,        /* cells of a cache line */
    ASKED = 4 * LINE, /* cells of a record; from there the processor's own prefetcher continues */
};

_Static_assert(2 + 2 * PLAN_PAIRS <= JOURNAL_CELLS, "each plan fits in the journal");

/* -- cells ------------------------------------------------------------------------------------------------------- */

static inline uint64_t load_cell(const struct core *core, uint64_t cell)
{
    return atomic_load_explicit(&core->cells[cell], memory_order_relaxed);
}

static inline uint64_t load_cell_acquire(const struct core *core, uint64_t cell)
{
    return atomic_load_explicit(&core->cells[cell], memory_order_acquire);
}

static inline void store_cell(struct core *core, uint64_t cell, uint64_t value)
{
    atomic_store_explicit(&core->cells[cell], value, memory_order_release);
    CORE_STORED(cell, value);
}

/* For data that a later release store publishes. */
static inline void store_cell_relaxed(struct core *core, uint64_t cell, uint64_t value)
{
    atomic_store_explicit(&core->cells[cell], value, memory_order_relaxed);
    CORE_STORED(cell, value);
}

static inline uint64_t field(const struct core *core, uint64_t slot, unsigned name)
{
    return core->first_slot + slot + name;
}

static inline uint64_t load_field(const struct core *core, uint64_t slot, unsigned name)
{
    return load_cell(core, field(core, slot, name));
}

/* Ask for a cell before other work. In a large arena an operation waits for memory most of its time, and for several
   places at once if they are asked for before the first is used. A prefetch is no access: any address is allowed, and is
   calculated as a number, which a damaged index may let overflow. */
static inline void prefetch(const struct core *core, uint64_t cell)
{
    __builtin_prefetch((const void *)((uintptr_t)core->cells + cell * CORE_CELL));
}

static inline struct core_key key_at(const struct core *core, uint64_t slot)
{
    return (struct core_key){load_field(core, slot, KEY_LOW), load_field(core, slot, KEY_HIGH)};
}

static inline bool is_slot(const struct core *core, uint64_t slot)
{
    return slot && slot <= core->last_slot && slot % SLOT == 0;
}

/* A slot, or the anchor of one of the two lists of use. */
static inline bool is_link(const struct core *core, uint64_t slot)
{
    return slot <= core->owned_list && slot % SLOT == 0;
}

static inline bool is_block(const struct core *core, uint64_t block)
{
    return block && block <= core->blocks;
}

static inline uint64_t head_of(const struct core *core, uint64_t block)
{
    return core->first_block + block * core->step;
}

/* Whether `run` blocks that begin with `block` can be a run; a free or written one has at least `shortest`. */
static inline bool is_run(const struct core *core, uint64_t block, uint64_t run, uint64_t shortest)
{
    return is_block(core, block) && run >= shortest && run <= core->blocks + 1 - block;
}

/* The numbers on which Python must agree, in the order of `core.py`. */
const uint64_t core_interface[CORE_NUMBERS] = {
    CORE_VERSION, SLOT, KEY_LOW, KEY_HIGH, RECORD, EXPIRES, USED, VERSION, PREV, NEXT, OWNER, CHAIN, OWNER_LINKS,
    OWNER_HEAD,
    STATE, PENDING, STRUCTURE, TICK, SESSIONS, EARLIEST_COPY, USED_BLOCKS, TOP_SLOT, FREE_SLOT, FREE_RUN, EARLIEST,
    RECENT_EARLIEST, HAND, WEIGHT, SETS, TOUCHES, DESTROYED, EXPIRED, EVICTED, EVICTED_OWNED, MAX, RECENCY, MAX_SESSION,
    MAX_PER_OWNER, DISPOSES, DISPOSES_ON_SET, HAS_WEIGHTS, OPTIONS_SUM, JOURNAL, JOURNAL_CELLS, CORE_HEAD,
    CORE_OVERHEAD, CORE_RUN, CORE_TOMBSTONE_WAYS,
};

/* Whether all regions lie inside `cells` cells, in order. Each number is bounded first, so that no sum or product
   overflows, here or later. */
bool core_fits(const struct core *core, uint64_t cells)
{
    return cells < UINT64_C(1) << 50 && core->slots && core->slots < LOW / SLOT && core->blocks && core->blocks < LOW
        && core->step > 1 && core->step < LOW && core->block_size == core->step * CORE_CELL
        && core->shortest == (CORE_RUN + core->block_size - 1) / core->block_size && core->buckets
        && core->buckets <= LOW && core->owner_buckets && core->owner_buckets <= LOW && core->tombstone_sets
        && core->tombstone_sets <= LOW
        && core->last_slot == core->slots * SLOT && core->owned_list == core->last_slot + SLOT
        && core->first_slot >= JOURNAL + JOURNAL_CELLS && core->first_slot < cells && core->first_bucket < cells
        && core->first_owner < cells && core->first_tombstone < cells && core->first_block < cells
        && core->first_slot + core->owned_list + SLOT <= core->first_bucket
        && core->first_bucket + core->buckets <= core->first_owner
        && core->first_owner + core->owner_buckets <= core->first_tombstone
        && core->first_tombstone + core->tombstone_sets * 2 * CORE_TOMBSTONE_WAYS <= core->first_block
        && core->blocks < (cells - core->first_block) / core->step;
}

/* -- records ----------------------------------------------------------------------------------------------------- */

/* The words that a record of `length` bytes takes. */
uint64_t core_capacity(uint64_t length)
{
    return (length + CORE_CELL - 1) / CORE_CELL;
}

/* Complete a record of `length` bytes whose body is in `words` already: see frame.py. */
void core_seal(
    uint64_t *words, struct core_key key, uint64_t owner, uint64_t created, uint32_t weight, uint64_t length)
{
    words[0] = (length & LOW) | (uint64_t)weight << 32;
    words[1] = key.low;
    words[2] = key.high;
    words[3] = owner;
    words[4] = created;
    const uint32_t crc = core_crc32(words, length - sizeof crc);
    memcpy((uint8_t *)words + length - sizeof crc, &crc, sizeof crc);
}

/* Copy the record of a slot into `buffer`. CORE_BUSY: it is changing, or damaged. */
static int copy_record(
    const struct core *core, uint64_t slot, struct core_key key, struct core_entry *entry, uint64_t *buffer,
    uint64_t room)
{
    const uint64_t residue = 0x2144df1c; /* the CRC of any data followed by its own CRC */
    entry->slot = slot;
    entry->version = load_cell_acquire(core, field(core, slot, VERSION));
    const uint64_t record = load_field(core, slot, RECORD);
    entry->expires = load_field(core, slot, EXPIRES);
    entry->used = load_field(core, slot, USED);
    const uint64_t length = entry->length = record >> 32;
    if (entry->version & 1 || length < CORE_OVERHEAD || length > core->blocks * core->block_size)
        return CORE_BUSY;
    if (length > room)
        return CORE_LONG;
    uint64_t block = record & LOW;
    for (uint64_t at = 0; at < core_capacity(length) && at < ASKED; at += LINE)
        prefetch(core, head_of(core, block) + at);
    for (uint64_t words = core_capacity(length), at = 0; at < words;) {
        if (!is_block(core, block))
            return CORE_BUSY;
        const uint64_t head = head_of(core, block), link = load_cell(core, head), run = link >> 32;
        if (!is_run(core, block, run, 1))
            return CORE_BUSY;
        const uint64_t holds = run * core->step - 1, part = words - at < holds ? words - at : holds;
        for (uint64_t i = 0; i < part; i++)
            buffer[at + i] = load_cell(core, head + 1 + i);
        at += part;
        block = link & LOW;
    }
    atomic_thread_fence(memory_order_acquire);
    if (load_field(core, slot, VERSION) != entry->version)
        return CORE_BUSY;
    if (core_crc32(buffer, length) != residue || buffer[1] != key.low || buffer[2] != key.high)
        return CORE_BUSY;
    return CORE_OK;
}

/* Ask for the bucket of a key before other work. */
void core_prefetch(const struct core *core, struct core_key key)
{
    prefetch(core, core->first_bucket + key.low % core->buckets);
}

/* Find the slot of a key. CORE_NO: there is none; without the lock, check STRUCTURE. CORE_DECLINED: the chain is
   damaged, or is being changed. */
static int find(const struct core *core, struct core_key key, uint64_t *found)
{
    uint64_t slot = load_cell(core, core->first_bucket + key.low % core->buckets);
    *found = 0;
    for (int hops = 0; slot; hops++) {
        if (!is_slot(core, slot) || hops == HOPS)
            return CORE_DECLINED;
        prefetch(core, field(core, slot, LINE)); /* the other cache line of the slot */
        if (load_field(core, slot, KEY_LOW) == key.low && load_field(core, slot, KEY_HIGH) == key.high) {
            *found = slot;
            return CORE_OK;
        }
        slot = load_field(core, slot, CHAIN);
    }
    return CORE_NO;
}

/* -- the lock ---------------------------------------------------------------------------------------------------- */

static uint64_t nanoseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * SECOND + (uint64_t)now.tv_nsec;
}

static inline void pause_spinning(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void count(struct core *core, uint64_t which, uint64_t by)
{
    if (core->row)
        store_cell(core, core->row + which, load_cell(core, core->row + which) + by);
}

/* Choose the row of counters of this process; 0: none. False: it is not between the journal and the slots. */
bool core_count_in(struct core *core, uint64_t row)
{
    if (row && (row < JOURNAL + JOURNAL_CELLS || row >= core->first_slot || core->first_slot - row <= ROW_WAITS))
        return false;
    core->row = row;
    return true;
}

void core_count_read(struct core *core, bool hit)
{
    count(core, hit ? ROW_HITS : ROW_MISSES, 1);
}

static void unlock(struct core *core)
{
    pthread_mutex_unlock(core->mutex);
}

/* Take the lock of a consistent arena that is in use. CORE_BUSY, CORE_DECLINED: it is not taken. */
static int lock(struct core *core, bool waits)
{
    uint64_t begun = 0;
    int code = pthread_mutex_trylock(core->mutex);
    if (code == EBUSY && waits && core->row) { /* without a row Python waits, because it also counts the wait then */
        begun = nanoseconds();
        do {
            pause_spinning();
            code = pthread_mutex_trylock(core->mutex);
        } while (code == EBUSY && nanoseconds() - begun < SPIN_TIME);
    }
    if (code == EBUSY)
        return CORE_BUSY;
    if (code == EOWNERDEAD) /* the journal has the plan that its owner did not finish */
        pthread_mutex_consistent(core->mutex);
    else if (code)
        return CORE_DECLINED;
    /* Called from inside another call of this thread; or a plan must be repeated, or another file opened. */
    if (*core->depth > core->locked_once || load_cell(core, PENDING) || load_cell(core, STATE)) {
        unlock(core);
        return CORE_DECLINED;
    }
    if (begun) {
        count(core, ROW_WAITED, nanoseconds() - begun);
        count(core, ROW_WAITS, 1); /* shorter than the shortest bound */
    }
    return CORE_OK;
}

/* -- plans ------------------------------------------------------------------------------------------------------- */

/* A mutation: cells and values in turn, see journal.py. `damaged`: damage was found, so it must not be committed. */
struct plan {
    uint64_t numbers[2 * PLAN_PAIRS];
    unsigned length;
    bool damaged;
};

static inline void plan_set(struct plan *plan, uint64_t cell, uint64_t value)
{
    if (plan->length == 2 * PLAN_PAIRS) {
        plan->damaged = true;
        return;
    }
    plan->numbers[plan->length++] = cell;
    plan->numbers[plan->length++] = value;
}

static inline void plan_field(const struct core *core, struct plan *plan, uint64_t slot, unsigned name, uint64_t value)
{
    plan_set(plan, field(core, slot, name), value);
}

/* Plan to add to a cell; a sum or difference that does not fit shows that the cell is damaged. */
static void plan_add(const struct core *core, struct plan *plan, uint64_t cell, uint64_t by)
{
    uint64_t sum;
    plan->damaged |= __builtin_add_overflow(load_cell(core, cell), by, &sum);
    plan_set(plan, cell, sum);
}

static void plan_subtract(const struct core *core, struct plan *plan, uint64_t cell, uint64_t by)
{
    const uint64_t value = load_cell(core, cell);
    plan->damaged |= value < by;
    plan_set(plan, cell, value - by);
}

/*
 * Apply a plan, wholly or not at all, whenever this process is killed. The order of the stores:
 *  - The journal changes after PENDING = 0 of an earlier plan, which until then may have to be applied again. A relaxed
 *    store may overtake a release store before it; the fence forbids that.
 *  - The journal, in any order, is complete before PENDING = number: that is a release store, and no store before a
 *    release store is moved behind it. The same holds for the record, which is not in the journal.
 *  - PENDING = number comes before the plan, whose stores keep their order: each of them is a release store.
 *  - The plan is applied before PENDING = 0, a release store.
 * The fence is one of the compiler. The machine need not order anything: all stores that a killed process has executed
 * become visible.
 */
static int commit(struct core *core, const struct plan *plan)
{
    if (plan->damaged)
        return CORE_DECLINED;
    atomic_signal_fence(memory_order_seq_cst);
    uint64_t number = load_cell(core, JOURNAL) + 1;
    number = number ? number : 1;
    store_cell_relaxed(core, JOURNAL, number);
    store_cell_relaxed(core, JOURNAL + 1, plan->length);
    for (unsigned i = 0; i < plan->length; i++)
        store_cell_relaxed(core, JOURNAL + 2 + i, plan->numbers[i]);
    store_cell(core, PENDING, number);
    for (unsigned i = 0; i < plan->length; i += 2)
        store_cell(core, plan->numbers[i], plan->numbers[i + 1]);
    store_cell(core, PENDING, 0);
    return CORE_OK;
}

/* -- the order of use and deadlines ------------------------------------------------------------------------------ */

enum list { IN_NONE, UNOWNED, OWNED };

/* Plan to make `slot` the most recently used of its list. */
static void plan_use(
    const struct core *core, struct plan *plan, uint64_t slot, enum list from, enum list to, uint64_t now)
{
    const uint64_t tick = load_cell(core, TICK), stamp = now > tick ? now : tick + 1;
    if (tick > now + STAMPS_AHEAD - 1) {
        plan->damaged = true;
        return;
    }
    plan_field(core, plan, slot, USED, stamp);
    plan_set(plan, TICK, stamp);
    const uint64_t anchor = to == OWNED ? core->owned_list : 0, first = load_field(core, anchor, NEXT);
    if (first == slot)
        return;
    if (!is_link(core, first) || load_field(core, first, PREV) != anchor) {
        plan->damaged = true;
        return;
    }
    if (from != IN_NONE) {
        const uint64_t above = load_field(core, slot, PREV), below = load_field(core, slot, NEXT);
        if (!is_link(core, above) || !is_link(core, below) || load_field(core, above, NEXT) != slot
            || load_field(core, below, PREV) != slot) {
            plan->damaged = true;
            return;
        }
        plan_field(core, plan, above, NEXT, below);
        plan_field(core, plan, below, PREV, above);
    }
    plan_field(core, plan, slot, NEXT, first);
    plan_field(core, plan, slot, PREV, anchor);
    plan_field(core, plan, first, PREV, slot);
    plan_field(core, plan, anchor, NEXT, slot);
}

static enum list list_of(uint64_t owner)
{
    return owner ? OWNED : UNOWNED;
}

/* Plan to lower the known bounds of the earliest deadline, if `expires` is below them. */
static void plan_deadline(const struct core *core, struct plan *plan, uint64_t expires)
{
    if (expires >= load_cell(core, RECENT_EARLIEST))
        return;
    plan_set(plan, RECENT_EARLIEST, expires);
    if (expires < load_cell(core, EARLIEST))
        plan_set(plan, EARLIEST, expires);
    if (expires < load_cell(core, EARLIEST_COPY))
        plan_set(plan, EARLIEST_COPY, expires);
}

/* See `deadline` in expiry.py. */
static uint64_t deadline(uint64_t now, uint64_t span)
{
    if (!span)
        return 0;
    return now >= NEVER || span >= NEVER - now ? NEVER : now + span + 1;
}

/* -- owners ------------------------------------------------------------------------------------------------------ */

/* The values of cells after the plan: planned ones here, all others in the arena. */
struct planned {
    uint64_t cells[6], values[6];
    unsigned length;
};

static uint64_t seen(const struct core *core, const struct planned *planned, uint64_t cell)
{
    for (unsigned i = 0; i < planned->length; i++)
        if (planned->cells[i] == cell)
            return planned->values[i];
    return load_cell(core, cell);
}

static void expect(struct planned *planned, uint64_t cell, uint64_t value)
{
    for (unsigned i = 0; i < planned->length; i++)
        if (planned->cells[i] == cell) {
            planned->values[i] = value;
            return;
        }
    planned->cells[planned->length] = cell;
    planned->values[planned->length++] = value;
}

/* Find the cell that leads to the first slot of an owner, and that slot; the bucket and 0 if there is none. */
static bool first_of(
    const struct core *core, const struct planned *planned, uint64_t owner, uint64_t *leading, uint64_t *first)
{
    const uint64_t bucket = core->first_owner + owner % core->owner_buckets;
    uint64_t cell = bucket;
    for (int hops = 0; hops < HOPS; hops++) {
        uint64_t slot = seen(core, planned, cell);
        if (cell != bucket)
            slot &= LOW;
        if (!slot) {
            *leading = bucket;
            *first = 0;
            return true;
        }
        if (!is_slot(core, slot))
            return false;
        if (load_field(core, slot, OWNER) == owner) {
            *leading = cell;
            *first = slot;
            return true;
        }
        cell = field(core, slot, OWNER_HEAD);
    }
    return false;
}

/* Plan to take `slot` out of the ring of its owner. */
static bool leave_owner(const struct core *core, struct planned *planned, uint64_t slot, uint64_t owner)
{
    uint64_t leading, first;
    if (!first_of(core, planned, owner, &leading, &first) || !first)
        return false;
    const uint64_t links = load_field(core, slot, OWNER_LINKS), before = links >> 32, after = links & LOW;
    const uint64_t head = load_field(core, first, OWNER_HEAD), lead = load_cell(core, leading);
    const bool alone = after == slot;
    if (!is_slot(core, before) || !is_slot(core, after) || (load_field(core, before, OWNER_LINKS) & LOW) != slot
        || load_field(core, after, OWNER_LINKS) >> 32 != slot || !(head >> 32) || alone != (head >> 32 == 1))
        return false;
    if (alone) {
        expect(planned, leading, (lead & ~LOW) | (head & LOW));
        return true;
    }
    const uint64_t back = field(core, before, OWNER_LINKS), forth = field(core, after, OWNER_LINKS);
    expect(planned, back, (load_cell(core, back) & ~LOW) | after);
    expect(planned, forth, before << 32 | (seen(core, planned, forth) & LOW));
    if (slot == first) {
        first = after;
        expect(planned, leading, (lead & ~LOW) | after);
    }
    expect(planned, field(core, first, OWNER_HEAD), head - (UINT64_C(1) << 32));
    return true;
}

/* Plan to make `slot` the first of `owner`, whose first slots are as `planned`. */
static bool join_owner(
    const struct core *core, struct plan *plan, const struct planned *planned, uint64_t slot, uint64_t owner)
{
    uint64_t leading, first;
    if (!first_of(core, planned, owner, &leading, &first))
        return false;
    const uint64_t links = field(core, slot, OWNER_LINKS), head = field(core, slot, OWNER_HEAD);
    const uint64_t lead = seen(core, planned, leading);
    if (!first) {
        plan_set(plan, links, slot << 32 | slot);
        plan_set(plan, head, UINT64_C(1) << 32 | lead);
        plan_set(plan, leading, slot);
        return true;
    }
    const uint64_t ring = field(core, first, OWNER_LINKS), last = seen(core, planned, ring) >> 32;
    if (!is_slot(core, last))
        return false;
    const uint64_t end = field(core, last, OWNER_LINKS), end_links = seen(core, planned, end);
    if ((end_links & LOW) != first)
        return false;
    const uint64_t after = last == first ? slot : seen(core, planned, ring) & LOW;
    uint64_t counted;
    if (__builtin_add_overflow(seen(core, planned, field(core, first, OWNER_HEAD)), UINT64_C(1) << 32, &counted))
        return false;
    plan_set(plan, links, last << 32 | first);
    plan_set(plan, end, (end_links & ~LOW) | slot);
    plan_set(plan, ring, slot << 32 | after);
    plan_set(plan, head, counted);
    plan_set(plan, leading, (lead & ~LOW) | slot);
    return true;
}

/* Plan to move `slot` from owner `old` to the front of owner `new`; 0 stands for no owner. */
static void plan_owner(const struct core *core, struct plan *plan, uint64_t slot, uint64_t old, uint64_t new)
{
    struct planned planned = {.length = 0};
    if (old && !leave_owner(core, &planned, slot, old))
        plan->damaged = true;
    for (unsigned i = 0; i < planned.length; i++)
        plan_set(plan, planned.cells[i], planned.values[i]);
    if (new && !join_owner(core, plan, &planned, slot, new))
        plan->damaged = true;
    plan_field(core, plan, slot, OWNER, new);
}

/* -- mutations --------------------------------------------------------------------------------------------------- */

/* Find the cell that leads to `slot` in the index. */
static bool unchain(const struct core *core, uint64_t slot, uint64_t *before)
{
    uint64_t cell = core->first_bucket + load_field(core, slot, KEY_LOW) % core->buckets;
    for (int hops = 0; hops < HOPS; hops++) {
        const uint64_t next = load_cell(core, cell);
        if (next == slot) {
            *before = cell;
            return true;
        }
        if (!is_slot(core, next))
            return false;
        cell = field(core, next, CHAIN);
    }
    return false;
}

/* Find the head of a record's last run, and how many blocks the record has. */
static bool last_run(const struct core *core, uint64_t record, uint64_t *last, uint64_t *blocks)
{
    uint64_t block = record & LOW, left = record >> 32;
    const uint64_t spare = 2 * core->shortest * core->block_size;
    for (*blocks = 0;;) {
        if (!is_block(core, block))
            return false;
        const uint64_t head = head_of(core, block), link = load_cell(core, head), run = link >> 32;
        if (!is_run(core, block, run, core->shortest))
            return false;
        const uint64_t holds = run * core->block_size - CORE_CELL;
        *blocks += run;
        if (*blocks > core->blocks) /* a ring */
            return false;
        if (left <= holds) {
            *last = head;
            /* The last run may be longer than needed only by a rest too short for a run of its own. */
            return holds - left < spare;
        }
        left -= holds;
        block = link & LOW;
    }
}

/* The share of `max` that the session in `slot` takes: in the head of its record, whose first block is valid. */
static uint64_t weight_at(const struct core *core, uint64_t slot)
{
    if (!load_cell(core, HAS_WEIGHTS))
        return 1;
    const uint64_t block = load_field(core, slot, RECORD) & LOW;
    return is_block(core, block) ? load_cell(core, head_of(core, block) + 1) >> 32 : 0;
}

/* Plan a tombstone: in place of the one that the key has, of a damaged one, else of the oldest of its set. */
static void plan_tombstone(
    const struct core *core, struct plan *plan, struct core_key key, uint64_t now, uint64_t renamed)
{
    const uint64_t first = core->first_tombstone + key.low % core->tombstone_sets * 2 * CORE_TOMBSTONE_WAYS;
    const uint64_t time = ((now > 2 ? now : 2) & ~RENAMED) | renamed;
    uint64_t oldest = 0, latest = 0, way = CORE_TOMBSTONE_WAYS;
    for (uint64_t i = 0; i < CORE_TOMBSTONE_WAYS && way == CORE_TOMBSTONE_WAYS; i++)
        if (load_cell(core, first + i) == key.high)
            way = i;
    if (way == CORE_TOMBSTONE_WAYS) {
        const uint64_t times = first + CORE_TOMBSTONE_WAYS;
        for (uint64_t i = 1; i < CORE_TOMBSTONE_WAYS; i++) {
            oldest = load_cell(core, times + i) < load_cell(core, times + oldest) ? i : oldest;
            latest = load_cell(core, times + i) > load_cell(core, times + latest) ? i : latest;
        }
        way = load_cell(core, times + latest) > time + AHEAD ? latest : oldest;
    }
    plan_set(plan, first + way, key.high);
    plan_set(plan, first + CORE_TOMBSTONE_WAYS + way, time);
}

/* Free `slot` and its blocks; see `Arena.drop`. */
static int drop(struct core *core, uint64_t slot, uint64_t counter, bool tombstone, uint64_t now)
{
    struct plan plan = {.length = 0};
    const uint64_t version = load_field(core, slot, VERSION) | 1, structure = load_cell(core, STRUCTURE) | 1;
    const uint64_t record = load_field(core, slot, RECORD), owner = load_field(core, slot, OWNER);
    const uint64_t free_run = load_cell(core, FREE_RUN), free_slot = load_cell(core, FREE_SLOT);
    const uint64_t above = load_field(core, slot, PREV), below = load_field(core, slot, NEXT);
    uint64_t before, last, freed;
    if (!unchain(core, slot, &before) || !last_run(core, record, &last, &freed) || free_run > core->blocks
        || free_slot > core->last_slot || version == UINT64_MAX || structure == UINT64_MAX)
        return CORE_DECLINED;
    if (!is_link(core, above) || !is_link(core, below) || load_field(core, above, NEXT) != slot
        || load_field(core, below, PREV) != slot)
        return CORE_DECLINED;
    if (tombstone)
        plan_tombstone(core, &plan, key_at(core, slot), now, 0);
    plan_set(&plan, STRUCTURE, structure);
    plan_field(core, &plan, slot, VERSION, version);
    plan_field(core, &plan, slot, RECORD, 0);
    plan_field(core, &plan, slot, EXPIRES, NEVER);
    plan_field(core, &plan, slot, VERSION, version + 1);
    plan_set(&plan, before, load_field(core, slot, CHAIN));
    plan_set(&plan, STRUCTURE, structure + 1);
    plan_field(core, &plan, above, NEXT, below);
    plan_field(core, &plan, below, PREV, above);
    plan_field(core, &plan, slot, NEXT, free_slot);
    plan_set(&plan, FREE_SLOT, slot);
    plan_set(&plan, last, (load_cell(core, last) & ~LOW) | free_run);
    plan_set(&plan, FREE_RUN, record & LOW);
    plan_subtract(core, &plan, USED_BLOCKS, freed);
    plan_subtract(core, &plan, SESSIONS, 1);
    plan_subtract(core, &plan, WEIGHT, weight_at(core, slot));
    plan_add(core, &plan, counter, 1);
    if (owner)
        plan_owner(core, &plan, slot, owner, 0);
    return commit(core, &plan);
}

/* Write a record into free blocks, which no reader uses before the plan is applied.
   Return how many blocks it takes, and where the free list begins after it; 0: the free list is damaged. */
static uint64_t write_record(struct core *core, struct plan *plan, const struct core_record *record, uint64_t *rest)
{
    uint64_t block = load_cell(core, FREE_RUN), taken = 0, at = 0;
    const uint64_t words = record->length / CORE_CELL, tail = record->length % CORE_CELL * 8;
    /* The plan that has freed these blocks is applied before they change. The fence also pairs with that of a reader
       that is still reading what these blocks held. */
    atomic_thread_fence(memory_order_release);
    for (;;) {
        if (!is_block(core, block))
            return 0;
        const uint64_t head = head_of(core, block), link = load_cell(core, head);
        const uint64_t run = link >> 32, following = link & LOW;
        if (!is_run(core, block, run, core->shortest))
            return 0;
        const uint64_t holds = run * core->step - 1, end = at + holds;
        uint64_t cell = head + 1;
        for (; at < words && at < end; at++)
            store_cell_relaxed(core, cell++, record->words[at]);
        if (at == words && at < end && tail) { /* the bytes of this word after the record stay */
            const uint64_t kept = UINT64_MAX << tail;
            store_cell_relaxed(core, cell, (load_cell(core, cell) & kept) | (record->words[at] & ~kept));
            cell++;
            at++;
        }
        if (at < words + (tail != 0)) {
            taken += run;
            block = following;
            continue;
        }
        const uint64_t used = (cell - head + core->step - 1) / core->step;
        const uint64_t need = used > core->shortest ? used : core->shortest;
        if (run - need >= core->shortest) {
            *rest = block + need;
            plan_set(plan, head, need << 32);
            plan_set(plan, head + need * core->step, (run - need) << 32 | following);
            return taken + need;
        }
        *rest = following;
        plan_set(plan, head, run << 32);
        return taken + run;
    }
}

/* The new state of a slot; `slot` is 0 for a new one. */
struct publication {
    uint64_t slot, expires, count;
    struct core_key key;
    bool tombstone;
};

/* Let a key point to a record; see `Arena.publish`. */
static int publish(struct core *core, const struct publication *wanted, const struct core_record *record, uint64_t now)
{
    struct plan plan = {.length = 0};
    const struct core_key key = wanted->key;
    uint64_t slot = wanted->slot, old = 0;
    bool renamed = true;
    if (slot) {
        old = load_field(core, slot, RECORD);
        renamed = load_field(core, slot, KEY_LOW) != key.low || load_field(core, slot, KEY_HIGH) != key.high;
        if (!old)
            return CORE_DECLINED;
    } else {
        slot = load_cell(core, FREE_SLOT);
        if (!slot) {
            slot = load_cell(core, TOP_SLOT);
            if (slot >= core->last_slot)
                return CORE_DECLINED;
            slot += SLOT;
            plan_set(&plan, TOP_SLOT, slot);
        } else if (is_slot(core, slot)) {
            plan_set(&plan, FREE_SLOT, load_field(core, slot, NEXT));
        }
        if (!is_slot(core, slot) || load_field(core, slot, RECORD))
            return CORE_DECLINED;
    }
    const uint64_t version = load_field(core, slot, VERSION) | 1, structure = load_cell(core, STRUCTURE) | 1;
    if (version == UINT64_MAX || structure == UINT64_MAX)
        return CORE_DECLINED;
    const uint64_t first = load_cell(core, FREE_RUN);
    uint64_t rest, taken = write_record(core, &plan, record, &rest);
    if (!taken)
        return CORE_DECLINED;
    if (renamed) {
        if (old && wanted->tombstone)
            plan_tombstone(core, &plan, key_at(core, slot), now, RENAMED);
        plan_set(&plan, STRUCTURE, structure);
    }
    plan_field(core, &plan, slot, VERSION, version);
    if (renamed) {
        /* A plan stores at most once into a cell that readers use: see arena.py. */
        const uint64_t bucket = core->first_bucket + key.low % core->buckets;
        uint64_t before = 0;
        if (old && !unchain(core, slot, &before))
            return CORE_DECLINED;
        plan_field(core, &plan, slot, KEY_LOW, key.low);
        plan_field(core, &plan, slot, KEY_HIGH, key.high);
        if (before != bucket) {
            if (old)
                plan_set(&plan, before, load_field(core, slot, CHAIN));
            plan_field(core, &plan, slot, CHAIN, load_cell(core, bucket));
            plan_set(&plan, bucket, slot);
        }
    }
    plan_field(core, &plan, slot, RECORD, record->length << 32 | first);
    plan_field(core, &plan, slot, EXPIRES, wanted->expires);
    const uint64_t was_owner = old ? load_field(core, slot, OWNER) : 0;
    if (record->owner != was_owner)
        plan_owner(core, &plan, slot, was_owner, record->owner);
    else if (load_field(core, slot, OWNER) != record->owner) /* damage: a free slot with an owner */
        plan_field(core, &plan, slot, OWNER, record->owner);
    plan_field(core, &plan, slot, VERSION, version + 1);
    if (renamed)
        plan_set(&plan, STRUCTURE, structure + 1);

    uint64_t weight = record->weight; /* differences are computed modulo 2**64 */
    if (old) {
        uint64_t last, freed;
        if (!last_run(core, old, &last, &freed))
            return CORE_DECLINED;
        plan_set(&plan, last, (load_cell(core, last) & ~LOW) | rest);
        plan_set(&plan, FREE_RUN, old & LOW);
        taken -= freed;
        weight -= weight_at(core, slot);
    } else {
        plan_set(&plan, FREE_RUN, rest);
        plan_add(core, &plan, SESSIONS, 1);
    }
    if (weight >> 63)
        plan_subtract(core, &plan, WEIGHT, -weight);
    else if (weight)
        plan_add(core, &plan, WEIGHT, weight);
    if (taken >> 63)
        plan_subtract(core, &plan, USED_BLOCKS, -taken);
    else if (taken)
        plan_add(core, &plan, USED_BLOCKS, taken);
    plan_add(core, &plan, wanted->count, 1);
    plan_use(core, &plan, slot, old ? list_of(was_owner) : IN_NONE, list_of(record->owner), now);
    plan_deadline(core, &plan, wanted->expires);
    return commit(core, &plan);
}

/* -- eviction ---------------------------------------------------------------------------------------------------- */

/* The bytes of a record that `blocks` blocks hold, however many runs they form. */
static uint64_t holds(const struct core *core, uint64_t blocks)
{
    return blocks * core->block_size - blocks * CORE_CELL / core->shortest;
}

/* Whether a record fits without evicting; both numbers are in range. */
static bool fits(const struct core *core, uint64_t length, bool new)
{
    return length <= holds(core, core->blocks - load_cell(core, USED_BLOCKS))
        && !(new && load_cell(core, SESSIONS) == core->slots);
}

static bool sane(const struct core *core)
{
    return load_cell(core, USED_BLOCKS) <= core->blocks && load_cell(core, SESSIONS) <= core->slots;
}

/* Whether the options match their checksum, before they cause an eviction; see store/live_options.py. */
static bool options_sound(const struct core *core)
{
    uint64_t options[OPTION_CELLS];
    for (unsigned i = 0; i < OPTION_CELLS; i++)
        options[i] = load_cell(core, MAX + i);
    const uint64_t known = load_cell(core, OPTIONS_SUM);
    return !known || core_crc32(options, sizeof options) == known;
}

/* Verify the numbers that are about to cause an eviction; see `Arena.audit`. */
static bool audit(const struct core *core, uint64_t length, bool new)
{
    if (new && load_cell(core, SESSIONS) == core->slots
        && (load_cell(core, FREE_SLOT) || load_cell(core, TOP_SLOT) < core->last_slot))
        return false;
    if (!load_cell(core, HAS_WEIGHTS)) {
        if (load_cell(core, WEIGHT) != load_cell(core, SESSIONS))
            return false;
    } else if (load_cell(core, MAX) && load_cell(core, WEIGHT) > load_cell(core, MAX)) {
        return false; /* Python adds up all weights */
    }
    const uint64_t free = core->blocks - load_cell(core, USED_BLOCKS);
    if (length <= holds(core, free))
        return true;
    uint64_t found = 0, block = load_cell(core, FREE_RUN);
    for (int hops = 0; block && found <= free; hops++) {
        if (!is_block(core, block) || hops == HOPS)
            return false;
        const uint64_t link = load_cell(core, head_of(core, block));
        found += link >> 32 ? link >> 32 : 1;
        block = link & LOW;
    }
    return found == free;
}

/* Return the end of the slots that were ever used, exclusive; 0 if the number is damaged. */
static uint64_t used_end(const struct core *core)
{
    const uint64_t top = load_cell(core, TOP_SLOT);
    return top % SLOT ? 0 : (top < core->last_slot ? top : core->last_slot) + SLOT;
}

/* Look in one batch of [from, to) for an expired session. */
static uint64_t expired_in(struct core *core, uint64_t from, uint64_t to, uint64_t keep, uint64_t now)
{
    for (uint64_t slot = from; slot < to; slot += SLOT)
        if (load_field(core, slot, EXPIRES) <= now && slot != keep && load_field(core, slot, RECORD)) {
            store_cell(core, HAND, slot);
            return slot;
        }
    return 0;
}

/* Find an expired session near the moving hand; see `Arena.expired_nearby`. */
static uint64_t expired_nearby(struct core *core, uint64_t keep, uint64_t now, uint64_t end)
{
    const uint64_t earliest = load_cell(core, EARLIEST);
    if (now < earliest && earliest <= load_cell(core, RECENT_EARLIEST) && now < load_cell(core, EARLIEST_COPY))
        return 0;
    uint64_t hand = load_cell(core, HAND);
    if (!hand || hand % SLOT || hand >= end)
        hand = SLOT;
    const uint64_t stop = hand + BATCH * SLOT < end ? hand + BATCH * SLOT : end;
    uint64_t found = expired_in(core, hand, stop, keep, now);
    if (found)
        return found;
    const uint64_t ahead = stop > hand ? (stop - hand) / SLOT : 0, limit = SLOT + (BATCH - ahead) * SLOT;
    const uint64_t around = hand < limit ? hand : limit;
    found = expired_in(core, SLOT, around, keep, now);
    if (!found)
        store_cell(core, HAND, around > SLOT ? around : stop);
    return found;
}

/* Find the least recently used slot of a list, other than `keep`. CORE_NO: the list has no other slot. */
static int least_used(const struct core *core, uint64_t anchor, uint64_t keep, uint64_t end, uint64_t *found)
{
    uint64_t slot = load_field(core, anchor, PREV);
    if (slot == keep && slot != anchor)
        slot = load_field(core, slot, PREV);
    if (slot == anchor)
        return CORE_NO;
    if (!is_slot(core, slot) || slot >= end || !load_field(core, slot, RECORD))
        return CORE_DECLINED;
    *found = slot;
    return CORE_OK;
}

/* Evict one session other than `keep`, in the order of `next_victim` in store/eviction.py. */
static int evict(struct core *core, uint64_t keep, uint64_t now)
{
    const uint64_t end = used_end(core);
    if (!end)
        return CORE_DECLINED;
    uint64_t victim = expired_nearby(core, keep, now, end);
    int found = CORE_OK;
    if (!victim)
        found = least_used(core, 0, keep, end, &victim);
    if (found == CORE_NO)
        found = least_used(core, core->owned_list, keep, end, &victim);
    if (found != CORE_OK)
        return CORE_DECLINED;
    const bool live = load_field(core, victim, EXPIRES) > now, owned = load_field(core, victim, OWNER);
    const int dropped = drop(core, victim, live ? owned ? EVICTED_OWNED : EVICTED : EXPIRED, false, now);
    if (dropped == CORE_OK)
        core->evicted += live;
    return dropped;
}

/* Evict until a record fits and all limits are kept; see `Eviction.make_room`. */
static int make_room(struct core *core, const struct core_record *record, uint64_t slot, uint64_t now)
{
    const uint64_t most = load_cell(core, MAX), most_of_owner = load_cell(core, MAX_PER_OWNER);
    const bool new = !slot;
    uint64_t weight = record->weight;
    if (load_cell(core, DISPOSES))
        return CORE_DUE;
    if (!sane(core) || (most_of_owner && record->owner && record->owner != (slot ? load_field(core, slot, OWNER) : 0)))
        return CORE_DECLINED;
    if (fits(core, record->length, new)
        && (!most || (slot && !load_cell(core, HAS_WEIGHTS)) || load_cell(core, WEIGHT) + weight <= most))
        return CORE_OK;
    uint64_t last, beside = 0;
    if (!options_sound(core) || (most && weight > most)
        || (slot && !last_run(core, load_field(core, slot, RECORD), &last, &beside)) || beside > core->blocks
        || record->length > holds(core, core->blocks - beside))
        return CORE_DECLINED;
    if (most && slot) {
        const uint64_t had = weight_at(core, slot);
        weight = weight > had ? weight - had : 0;
    }
    bool audited = false;
    while (!fits(core, record->length, new) || (most && weight && load_cell(core, WEIGHT) + weight > most)) {
        if (!audited && !audit(core, record->length, new))
            return CORE_DECLINED;
        audited = true;
        const int evicted = evict(core, slot, now);
        if (evicted != CORE_OK)
            return evicted;
        if (!sane(core))
            return CORE_DECLINED;
    }
    return CORE_OK;
}

/* -- operations -------------------------------------------------------------------------------------------------- */

/* Take the lock and find a key. CORE_OK, CORE_NO: the lock is taken. */
static int lock_and_find(struct core *core, struct core_key key, uint64_t *slot)
{
    const int locked = lock(core, true);
    if (locked != CORE_OK)
        return locked;
    const int found = find(core, key, slot);
    if (found == CORE_OK) { /* its neighbours in the order of use are changed too */
        prefetch(core, field(core, load_field(core, *slot, PREV), NEXT));
        prefetch(core, field(core, load_field(core, *slot, NEXT), PREV));
    } else if (found < 0) {
        unlock(core);
    }
    return found;
}

/* Read the record of a key, expired or not. CORE_BUSY: it is changing, or damaged. */
int core_read(struct core *core, struct core_key key, struct core_entry *entry, uint64_t *buffer, uint64_t room)
{
    uint64_t slot;
    if (!LOCK_FREE_READS) {
        int result = lock_and_find(core, key, &slot);
        if (result < 0)
            return result;
        if (result == CORE_OK)
            result = copy_record(core, slot, key, entry, buffer, room);
        unlock(core);
        return result;
    }
    for (int tries = 0; tries < TRIES; tries++) {
        if (load_cell(core, STATE))
            return CORE_DECLINED;
        const uint64_t structure = load_cell_acquire(core, STRUCTURE);
        const int found = find(core, key, &slot);
        if (found == CORE_NO) {
            atomic_thread_fence(memory_order_acquire);
            if (!(structure & 1) && load_cell(core, STRUCTURE) == structure)
                return CORE_NO;
        } else if (found == CORE_OK) {
            const int copied = copy_record(core, slot, key, entry, buffer, room);
            if (copied != CORE_BUSY)
                return copied;
        }
    }
    return CORE_BUSY;
}

/* Make room and publish; return CORE_OK plus the number of live sessions that were evicted. */
static int write_out(
    struct core *core, const struct publication *wanted, const struct core_record *record, uint64_t now)
{
    prefetch(core, head_of(core, load_cell(core, FREE_RUN)));
    if (wanted->slot)
        prefetch(core, head_of(core, load_field(core, wanted->slot, RECORD) & LOW));
    int result = make_room(core, record, wanted->slot, now);
    if (result == CORE_OK && wanted->slot && load_cell(core, DISPOSES_ON_SET))
        result = CORE_DUE;
    if (result == CORE_OK)
        result = publish(core, wanted, record, now);
    if (result == CORE_OK) {
        result += (int)core->evicted;
        core->evicted = 0;
    }
    return result;
}

/* Make a session that was read the most recently used, if that is due; see `Store._count_use`. */
int core_use(struct core *core, const struct core_entry *entry, uint64_t now)
{
    const uint64_t recency = load_cell(core, RECENCY), used = entry->used;
    if (recency && (used > now ? used - now < STAMPS_AHEAD : now - used < recency))
        return CORE_OK;
    const int locked = lock(core, !recency);
    if (locked == CORE_BUSY && recency) /* optional work: while the lock is taken, reads continue */
        return CORE_OK;
    if (locked != CORE_OK)
        return locked;
    int result = CORE_OK;
    if (load_field(core, entry->slot, VERSION) == entry->version) {
        struct plan plan = {.length = 0};
        const enum list list = list_of(load_field(core, entry->slot, OWNER));
        plan_use(core, &plan, entry->slot, list, list, now);
        result = commit(core, &plan);
    }
    unlock(core);
    return result;
}

/* Whether the option max_session allows a payload of that many bytes. */
bool core_allows(const struct core *core, uint64_t payload)
{
    return payload <= load_cell(core, MAX_SESSION);
}

/* Write a whole session. `present`: whether it must be present (1) or absent (0) before; -1: either. */
int core_put(
    struct core *core, struct core_key key, const struct core_record *record, int present, uint64_t span, uint64_t now)
{
    uint64_t slot;
    int result = lock_and_find(core, key, &slot);
    if (result < 0)
        return result;
    if (slot && load_field(core, slot, EXPIRES) <= now) {
        result = load_cell(core, DISPOSES) ? CORE_DUE : drop(core, slot, EXPIRED, false, now);
        slot = 0;
    }
    if (result >= 0) {
        if (present >= 0 && present != (slot != 0)) {
            result = CORE_NO;
        } else {
            const struct publication wanted = {.slot = slot, .key = key, .expires = deadline(now, span), .count = SETS};
            result = write_out(core, &wanted, record, now);
        }
    }
    unlock(core);
    return result;
}

/* Write a session that was read before, perhaps under another key. CORE_CHANGED: it is not what was read. */
int core_exchange(struct core *core, const struct core_exchange *change, const struct core_record *record, uint64_t now)
{
    const bool renamed = change->old_key.low != change->new_key.low || change->old_key.high != change->new_key.high;
    uint64_t slot, other = 0;
    int result = lock_and_find(core, change->old_key, &slot);
    if (result < 0)
        return result;
    if (!slot || load_field(core, slot, EXPIRES) <= now)
        result = CORE_NO;
    else if (slot != change->slot || load_field(core, slot, VERSION) != change->version)
        result = CORE_CHANGED;
    else if (renamed && find(core, change->new_key, &other) != CORE_NO)
        result = other && load_field(core, other, EXPIRES) > now ? CORE_NO : CORE_DECLINED;
    else {
        const struct publication wanted = {
            .slot = slot,
            .key = change->new_key,
            .expires = change->keeps_deadline ? load_field(core, slot, EXPIRES) : deadline(now, change->span),
            .count = change->count,
            .tombstone = change->tombstone,
        };
        result = write_out(core, &wanted, record, now);
    }
    unlock(core);
    return result;
}

/* Give a session another deadline and make it the most recently used. */
int core_touch(struct core *core, struct core_key key, uint64_t span, uint64_t now)
{
    uint64_t slot;
    int result = lock_and_find(core, key, &slot);
    if (result < 0)
        return result;
    if (!slot || load_field(core, slot, EXPIRES) <= now) {
        result = CORE_NO;
    } else {
        struct plan plan = {.length = 0};
        const uint64_t expires = deadline(now, span);
        const enum list list = list_of(load_field(core, slot, OWNER));
        plan_field(core, &plan, slot, EXPIRES, expires);
        plan_add(core, &plan, TOUCHES, 1);
        plan_use(core, &plan, slot, list, list, now);
        plan_deadline(core, &plan, expires);
        result = commit(core, &plan);
    }
    unlock(core);
    return result;
}

/* Remove a session. CORE_NO: it was absent, or expired and was removed. */
int core_drop(struct core *core, struct core_key key, bool tombstone, uint64_t now)
{
    uint64_t slot;
    int result = lock_and_find(core, key, &slot);
    if (result < 0)
        return result;
    if (slot) {
        const bool live = load_field(core, slot, EXPIRES) > now;
        result = load_cell(core, DISPOSES)
            ? CORE_DUE
            : drop(core, slot, live ? DESTROYED : EXPIRED, tombstone && live, now);
        if (result == CORE_OK && !live)
            result = CORE_NO;
    }
    unlock(core);
    return result;
}
