/* Keyed dropout on a CPU: what becomes of a number depends on the key of its row and its place in the row alone.

   dropout.py has the same arithmetic in PyTorch's operations, number for number. The loops are plain C that compilers
   vectorize; where they can, for several processors, of which the loader takes the best. */

#include <stdint.h>
#include <string.h>

#define API __attribute__((visibility("default")))

#if defined(__x86_64__) && defined(__GLIBC__) && __has_attribute(target_clones)
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CLONES
#endif

#if defined(__clang__)
#define EACH_ALONE _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define EACH_ALONE _Pragma("GCC ivdep")
#else
#define EACH_ALONE
#endif

/* 32 bits of a number's own: multiply and shift, with the key's upper half in the middle. */
static inline uint32_t bits_of(uint64_t key, uint32_t place) {
    uint32_t x = (uint32_t)key + place * 0x9e3779b9u;
    x = (x ^ (x >> 16)) * 0x21f0aaadu;
    x ^= (uint32_t)(key >> 32);
    x = (x ^ (x >> 15)) * 0x735a2d97u;
    return x ^ (x >> 15);
}

static inline float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t as_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* All ones where the number stays: with masks instead of branches every compiler vectorizes the loops. */
static inline uint32_t kept_mask(uint64_t key, uint32_t place, uint32_t threshold) {
    return -(uint32_t)(bits_of(key, place) >= threshold);
}

/* output = input * scale where the bits are threshold or more, otherwise 0; rows of `size` numbers. The output may be
   the input. */
API CLONES void belt_drop_fp32(const float *input, float *output, const uint64_t *keys, int64_t num_rows, int64_t size,
                               uint32_t threshold, float scale) {
    for (int64_t row = 0; row < num_rows; row++) {
        const float *from = input + row * size;
        float *to = output + row * size;
        const uint64_t key = keys[row];
        EACH_ALONE
        for (int64_t place = 0; place < size; place++) {
            to[place] = as_float(as_bits(from[place] * scale) & kept_mask(key, (uint32_t)place, threshold));
        }
    }
}

/* The same for bfloat16, the upper half of a float: rounded to the nearest, to even where two are as near. */
API CLONES void belt_drop_bf16(const uint16_t *input, uint16_t *output, const uint64_t *keys, int64_t num_rows,
                               int64_t size, uint32_t threshold, float scale) {
    for (int64_t row = 0; row < num_rows; row++) {
        const uint16_t *from = input + row * size;
        uint16_t *to = output + row * size;
        const uint64_t key = keys[row];
        EACH_ALONE
        for (int64_t place = 0; place < size; place++) {
            uint32_t given = (uint32_t)from[place] << 16, kept = as_bits(as_float(given) * scale);
            kept += 0x7fffu + ((kept >> 16) & 1u);
            uint32_t is_nan = -(uint32_t)((given & 0x7fffffffu) > 0x7f800000u); /* which rounding could end */
            kept = (given & is_nan) | (kept & ~is_nan);
            to[place] = (uint16_t)((kept & kept_mask(key, (uint32_t)place, threshold)) >> 16);
        }
    }
}

/* mask = 1 where a number stays. */
API CLONES void belt_keep(uint8_t *restrict mask, const uint64_t *restrict keys, int64_t num_rows, int64_t size,
                          uint32_t threshold) {
    for (int64_t row = 0; row < num_rows; row++) {
        uint8_t *to = mask + row * size;
        const uint64_t key = keys[row];
        for (int64_t place = 0; place < size; place++) {
            to[place] = bits_of(key, (uint32_t)place) >= threshold;
        }
    }
}
