/*
 * Readers beside writers in one process, for sanitizers: race IMAGE COUNT HOSTILE MUTEX WORD ONCE GEOMETRY...
 *
 * All threads run until COUNT sessions have been written and COUNT have been read, however long that takes.
 *
 * IMAGE is an empty arena. Each thread has a `struct core` of its own over the same memory, as each process has. Each
 * byte of a session says which session it is and when it was written, so a mixed one shows. If HOSTILE is 1, a further
 * thread damages the arena all the time: sessions may be mixed then, and only the sanitizer judges.
 */

#define _GNU_SOURCE

#include "core.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { KEYS = 64, WRITERS = 3, READERS = 3, LARGEST = 4000, SETS = 48, FIRST_CELL = 32, PENDING = 33 };

static struct core shared;
static uint64_t enough, cells;
static const uint64_t *image;
static _Atomic uint64_t hits, misses, busy, wrong, writes;

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static uint64_t next(uint64_t *state)
{
    *state ^= *state << 13, *state ^= *state >> 7, *state ^= *state << 17;
    return *state;
}

static bool unfinished(void)
{
    return writes < enough || hits < enough;
}

static void *write_sessions(void *seed)
{
    struct core core = shared;
    uint64_t state = (uint64_t)(uintptr_t)seed, words[LARGEST / 8 + 8], buffer[LARGEST / 8 + 8];
    while (unfinished()) {
        const uint64_t key = next(&state) % KEYS, now = now_ns(), owner = next(&state) % 4;
        const struct core_key name = core_key_of((const uint8_t *)&key, sizeof key);
        struct core_record record = {.words = words, .weight = 1, .owner = owner};
        record.length = CORE_OVERHEAD + 8 + next(&state) % (LARGEST - CORE_OVERHEAD - 8);
        memset(words, (int)(next(&state) % 256), sizeof words);
        core_seal(words, name, owner, now, 1, record.length);
        int result;
        struct core_entry entry;
        switch (next(&state) % 8) {
        case 0:
            result = core_drop(&core, name, true, now);
            break;
        case 1:
            result = core_touch(&core, name, 1000000000000u, now);
            break;
        case 2:
        case 3:
            result = core_read(&core, name, &entry, buffer, sizeof buffer);
            if (result == CORE_OK) {
                const uint64_t other = next(&state) % KEYS;
                struct core_exchange change = {
                    .slot = entry.slot, .version = entry.version, .old_key = name, .new_key = name,
                    .keeps_deadline = true, .count = SETS, .tombstone = true};
                if (next(&state) % 2)
                    change.new_key = core_key_of((const uint8_t *)&other, sizeof other);
                core_seal(words, change.new_key, owner, now, 1, record.length);
                result = core_exchange(&core, &change, &record, now);
            }
            break;
        default:
            result = core_put(&core, name, &record, -1, 1000000000000u, now);
        }
        writes += result > 0;
        busy += result == CORE_BUSY;
        wrong += result == CORE_DECLINED || result == CORE_DUE;
    }
    return NULL;
}

static void *read_sessions(void *seed)
{
    struct core core = shared;
    uint64_t state = (uint64_t)(uintptr_t)seed, buffer[LARGEST / 8 + 8];
    while (unfinished()) {
        const uint64_t key = next(&state) % KEYS;
        struct core_entry entry;
        const int result = core_read(
            &core, core_key_of((const uint8_t *)&key, sizeof key), &entry, buffer, sizeof buffer);
        if (result == CORE_OK) {
            const uint8_t *body = (const uint8_t *)buffer + CORE_HEAD;
            for (uint64_t i = 1; i < entry.length - CORE_OVERHEAD; i++)
                wrong += body[i] != body[0];
            hits++;
        }
        misses += result == CORE_NO;
        busy += result == CORE_BUSY;
        wrong += result == CORE_DECLINED || result == CORE_LONG;
    }
    return NULL;
}

/* Store what might be a slot, a run or a length, flip a bit, or restore the image, in any cell behind the mutex. */
static void *damage(void *seed)
{
    uint64_t state = (uint64_t)(uintptr_t)seed;
    while (unfinished()) {
        const uint64_t pause = now_ns() + next(&state) % 100000;
        if (next(&state) % 64 == 0)
            for (uint64_t cell = FIRST_CELL; cell < cells; cell++)
                atomic_store_explicit(&shared.cells[cell], image[cell], memory_order_relaxed);
        const uint64_t places[] = {
            FIRST_CELL + next(&state) % 96,
            shared.first_slot + next(&state) % (shared.first_block - shared.first_slot),
            shared.first_block + shared.step * (next(&state) % (shared.blocks + 1))};
        const uint64_t cell = places[next(&state) % 3], slot = next(&state) % (shared.slots + 3) * 12;
        const uint64_t values[] = {
            next(&state), slot, next(&state) % 64 << 32 | next(&state) % (shared.blocks + 4),
            atomic_load(&shared.cells[cell]) ^ UINT64_C(1) << next(&state) % 64, UINT64_MAX >> next(&state) % 64,
            UINT64_C(5000) << 32 | next(&state) % (shared.blocks + 4)};
        if (cell > PENDING) /* else nothing would be done until it is restored */
            atomic_store_explicit(&shared.cells[cell], values[next(&state) % 6], memory_order_relaxed);
        while (now_ns() < pause)
            ;
    }
    return NULL;
}

int main(int count, char **arguments)
{
    if (count != 22)
        return 2;
    FILE *file = fopen(arguments[1], "rb");
    if (!file || fseek(file, 0, SEEK_END))
        return 2;
    const size_t size = (size_t)ftell(file);
    char *memory = aligned_alloc(64, (size + 63) / 64 * 64);
    rewind(file);
    if (!memory || fread(memory, 1, size, file) != size)
        return 2;
    uint64_t *copy = malloc(size);
    if (!copy)
        return 2;
    image = memcpy(copy, memory, size);
    cells = size / 8;
    const bool hostile = atoi(arguments[3]);
    uint64_t n[18];
    for (int i = 0; i < 18; i++)
        n[i] = strtoull(arguments[4 + i], NULL, 10);
    shared = (struct core){
        .cells = (_Atomic uint64_t *)memory, .mutex = (pthread_mutex_t *)(memory + n[0]),
        .depth = (const uint32_t *)(memory + n[0]) + n[1], .locked_once = (uint32_t)n[2], .slots = n[3],
        .blocks = n[4], .block_size = n[5], .shortest = n[6], .buckets = n[7], .owner_buckets = n[8],
        .tombstone_sets = n[9], .first_slot = n[10], .first_bucket = n[11], .first_owner = n[12],
        .first_tombstone = n[13], .first_block = n[14], .step = n[15], .last_slot = n[16], .owned_list = n[17]};
    if (!core_fits(&shared, size / 8))
        return 2;
    pthread_mutexattr_t kind;
    pthread_mutexattr_init(&kind);
    pthread_mutexattr_settype(&kind, PTHREAD_MUTEX_RECURSIVE);
    pthread_mutex_init(shared.mutex, &kind);
    enough = strtoull(arguments[2], NULL, 10);
    pthread_t threads[WRITERS + READERS + 1];
    const uintptr_t started = WRITERS + READERS + hostile;
    for (uintptr_t i = 0; i < started; i++)
        pthread_create(
            &threads[i], NULL, i < WRITERS ? write_sessions : i < WRITERS + READERS ? read_sessions : damage,
            (void *)(i * 7919 + 1));
    for (uintptr_t i = 0; i < started; i++)
        pthread_join(threads[i], NULL);
    free(copy);
    free(memory);
    printf("%lu writes, %lu hits, %lu misses, %lu busy, %lu wrong\n", writes, hits, misses, busy, wrong);
    return wrong && !hostile;
}
