/* Keyed dropout on a CPU: what becomes of a number depends on the key of its row and its place in the row alone.

   dropout.py has the same arithmetic in PyTorch's operations, number for number. The loops are plain C that compilers
   vectorize; where they can, for several processors, of which the loader takes the best. */

#include <stdint.h>

#define API __attribute__((visibility("default")))

#if defined(__x86_64__) && defined(__GLIBC__) && __has_attribute(target_clones)
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CLONES
#endif

/* 32 bits of a number's own: multiply and shift, with the key's upper half in the middle. */
static inline uint32_t bits_of(uint64_t key, uint32_t place) {
    uint32_t x = (uint32_t)key + place * 0x9e3779b9u;
    x = (x ^ (x >> 16)) * 0x21f0aaadu;
    x ^= (uint32_t)(key >> 32);
    x = (x ^ (x >> 15)) * 0x735a2d97u;
    return x ^ (x >> 15);
}

/* output = input * scale where the bits are threshold or more, otherwise 0; rows of `size` numbers. */
API CLONES void belt_drop(const float *restrict input, float *restrict output, const uint64_t *restrict keys,
                          int64_t num_rows, int64_t size, uint32_t threshold, float scale) {
    for (int64_t row = 0; row < num_rows; row++) {
        const float *from = input + row * size;
        float *to = output + row * size;
        const uint64_t key = keys[row];
        for (int64_t place = 0; place < size; place++) {
            float kept = from[place] * scale;
            to[place] = bits_of(key, (uint32_t)place) < threshold ? 0.0f : kept;
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
