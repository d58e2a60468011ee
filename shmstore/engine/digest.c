/* Digests: BLAKE2b of ids and owners, and the CRC-32 of records. */

#include "core.h"

#include <string.h>

#ifdef CORE_X86
#include <immintrin.h>
#endif

static inline uint64_t rotate(uint64_t x, int bits)
{
    return x >> bits | x << (64 - bits);
}

/* BLAKE2b without a key (RFC 7693). Its state is in `h` afterwards. */
static void blake2b(const uint8_t *data, uint64_t length, uint64_t size, uint64_t h[8])
{
    static const uint64_t iv[8] = {
        UINT64_C(0x6a09e667f3bcc908), UINT64_C(0xbb67ae8584caa73b), UINT64_C(0x3c6ef372fe94f82b),
        UINT64_C(0xa54ff53a5f1d36f1), UINT64_C(0x510e527fade682d1), UINT64_C(0x9b05688c2b3e6c1f),
        UINT64_C(0x1f83d9abfb41bd6b), UINT64_C(0x5be0cd19137e2179)};
    static const uint8_t sigma[12][16] = {
        {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
        {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4}, {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
        {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13}, {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
        {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11}, {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
        {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5}, {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0},
        {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3}};
    memcpy(h, iv, sizeof iv);
    h[0] ^= UINT64_C(0x01010000) ^ size;
    for (uint64_t at = 0;;) {
        uint64_t m[16] = {0}, v[16];
        const uint64_t part = length - at > 128 ? 128 : length - at;
        memcpy(m, data + at, part);
        at += part;
        memcpy(v, h, 64);
        memcpy(v + 8, iv, sizeof iv);
        v[12] ^= at;
        if (at == length)
            v[14] = ~v[14];
#define MIX(a, b, c, d, x, y)                                                                                          \
    v[a] += v[b] + m[x], v[d] = rotate(v[d] ^ v[a], 32), v[c] += v[d], v[b] = rotate(v[b] ^ v[c], 24);                 \
    v[a] += v[b] + m[y], v[d] = rotate(v[d] ^ v[a], 16), v[c] += v[d], v[b] = rotate(v[b] ^ v[c], 63)
#pragma GCC unroll 12 /* then the words of `m` are named by constants, and most values stay in registers */
        for (int round = 0; round < 12; round++) {
            const uint8_t *s = sigma[round];
            MIX(0, 4, 8, 12, s[0], s[1]);
            MIX(1, 5, 9, 13, s[2], s[3]);
            MIX(2, 6, 10, 14, s[4], s[5]);
            MIX(3, 7, 11, 15, s[6], s[7]);
            MIX(0, 5, 10, 15, s[8], s[9]);
            MIX(1, 6, 11, 12, s[10], s[11]);
            MIX(2, 7, 8, 13, s[12], s[13]);
            MIX(3, 4, 9, 14, s[14], s[15]);
        }
#undef MIX
        for (int i = 0; i < 8; i++)
            h[i] ^= v[i] ^ v[i + 8];
        if (at == length)
            return;
    }
}

/* See `key_of` in ids.py. */
struct core_key core_key_of(const uint8_t *name, uint64_t length)
{
    uint64_t h[8];
    blake2b(name, length, 16, h);
    return (struct core_key){h[0], h[1]};
}

/* See `stored_owner_digest` in ids.py: a big-endian number. */
uint64_t core_owner_digest(const uint8_t *owner, uint64_t length)
{
    uint64_t h[8];
    blake2b(owner, length, 8, h);
    const uint64_t digest = __builtin_bswap64(h[0]);
    return digest ? digest : 1;
}

/* Eight bytes at a time. */
static uint32_t crc_table[8][256];

static uint32_t crc32_by_table(uint32_t crc, const uint64_t *words, uint64_t length)
{
    for (; length >= 8; length -= 8) {
        const uint64_t w = *words++ ^ crc;
        crc = crc_table[7][w & 255] ^ crc_table[6][w >> 8 & 255] ^ crc_table[5][w >> 16 & 255]
            ^ crc_table[4][w >> 24 & 255] ^ crc_table[3][w >> 32 & 255] ^ crc_table[2][w >> 40 & 255]
            ^ crc_table[1][w >> 48 & 255] ^ crc_table[0][w >> 56];
    }
    for (const uint8_t *byte = (const uint8_t *)words; length; length--)
        crc = crc_table[0][(crc ^ *byte++) & 255] ^ crc >> 8;
    return crc;
}

#ifdef CORE_X86

/* The same for a multiple of 16 bytes, at least 64, by carry-less multiplication: Gopal and others, "Fast CRC
   Computation for Generic Polynomials Using PCLMULQDQ Instruction", Intel 2009, whose constants these are. */
__attribute__((target("pclmul"))) static uint32_t crc32_by_clmul(uint32_t crc, const uint64_t *words, uint64_t length)
{
    const __m128i *at = (const __m128i *)words;
    const __m128i fold4 = _mm_set_epi64x(0x01c6e41596, 0x0154442bd4);
    const __m128i fold1 = _mm_set_epi64x(0x00ccaa009e, 0x01751997d0);
    const __m128i last = _mm_set_epi64x(0, 0x0163cd6124), poly = _mm_set_epi64x(0x01f7011641, 0x01db710641);
    const __m128i low = _mm_setr_epi32(~0, 0, ~0, 0);
#define FOLD(x, by, next)                                                                                              \
    _mm_xor_si128(_mm_xor_si128(_mm_clmulepi64_si128(x, by, 0x00), _mm_clmulepi64_si128(x, by, 0x11)), next)
    __m128i x = _mm_xor_si128(_mm_loadu_si128(at), _mm_cvtsi32_si128((int)crc));
    __m128i x1 = _mm_loadu_si128(at + 1), x2 = _mm_loadu_si128(at + 2), x3 = _mm_loadu_si128(at + 3);
    for (at += 4, length -= 64; length >= 64; at += 4, length -= 64) {
        x = FOLD(x, fold4, _mm_loadu_si128(at));
        x1 = FOLD(x1, fold4, _mm_loadu_si128(at + 1));
        x2 = FOLD(x2, fold4, _mm_loadu_si128(at + 2));
        x3 = FOLD(x3, fold4, _mm_loadu_si128(at + 3));
    }
    x = FOLD(x, fold1, x1);
    x = FOLD(x, fold1, x2);
    x = FOLD(x, fold1, x3);
    for (; length >= 16; at++, length -= 16)
        x = FOLD(x, fold1, _mm_loadu_si128(at));
#undef FOLD
    x = _mm_xor_si128(_mm_srli_si128(x, 8), _mm_clmulepi64_si128(x, fold1, 0x10));
    x = _mm_xor_si128(_mm_srli_si128(x, 4), _mm_clmulepi64_si128(_mm_and_si128(x, low), last, 0x00));
    __m128i quotient = _mm_clmulepi64_si128(_mm_and_si128(x, low), poly, 0x10);
    quotient = _mm_clmulepi64_si128(_mm_and_si128(quotient, low), poly, 0x00);
    return (uint32_t)_mm_cvtsi128_si32(_mm_srli_si128(_mm_xor_si128(x, quotient), 4));
}

static bool has_clmul;
#endif

__attribute__((constructor)) static void prepare_crc32(void)
{
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t crc = byte;
        for (int bit = 0; bit < 8; bit++)
            crc = crc & 1 ? crc >> 1 ^ UINT32_C(0xedb88320) : crc >> 1;
        crc_table[0][byte] = crc;
    }
    for (uint32_t byte = 0; byte < 256; byte++)
        for (int i = 1; i < 8; i++)
            crc_table[i][byte] = crc_table[i - 1][byte] >> 8 ^ crc_table[0][crc_table[i - 1][byte] & 255];
#ifdef CORE_X86
    __builtin_cpu_init();
    has_clmul = __builtin_cpu_supports("pclmul");
#endif
}

/* CRC-32 of `length` bytes, as zlib computes it. */
uint32_t core_crc32(const uint64_t *words, uint64_t length)
{
    uint32_t crc = ~UINT32_C(0);
#ifdef CORE_X86
    if (has_clmul && length >= 64) {
        crc = crc32_by_clmul(crc, words, length & ~UINT64_C(15));
        words += length / 16 * 2;
        length %= 16;
    }
#endif
    return ~crc32_by_table(crc, words, length);
}
