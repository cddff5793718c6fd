/* Attention of packed chunks on one core with AVX-512: context = softmax(q k') v of each chunk and head.

   Queries come scaled by log2(e) / sqrt(head size), so that softmax is 2^score over its sum. Scores never leave the
   core's cache: a block of keys and values meets all queries before the next block comes, and what they add to a
   token's context is kept until the last (the order of FlashAttention, Dao et al. 2022, arXiv 2205.14135, with keys
   outside). Nothing is scaled again on the way: 2^score needs no shift while |score| stays within a float's exponent,
   which the norms of queries and keys bound (Cauchy and Schwarz), and rows beyond the bound get their maximum first.

   Numbers are fp32, or bf16 whose products are summed in fp32. Both are moved as 32-bit words: one fp32 number, or two
   bf16 numbers that one instruction multiplies. */

#include <stdint.h>

#define API __attribute__((visibility("default")))

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define TARGET target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#define INLINE static inline __attribute__((always_inline, TARGET))

enum {
    LANES = 16,                      /* words of a vector */
    PANEL = 2 * LANES,               /* keys, or numbers of a value, side by side in a product */
    ROWS = 8,                        /* queries of a product: 8 x 2 sums stay in registers with all that exp2 needs */
    MOST_WORDS = 128,                /* of a head */
    MOST_KEYS = 256,                 /* of a block */
    BLOCK_WORDS = 4096,              /* of a block of keys: 16 KiB, and as many of values, fit the first cache */
    QUERY_STEP = MOST_WORDS + LANES, /* odd multiples of a cache line apart, so that rows do not evict each other */
    WEIGHT_STEP = MOST_KEYS + LANES,
};

static const float LARGEST_SCORE = 100.0f; /* as a power of two: sums of 2^100 stay below 2^127 */

/* One head of one chunk; steps are bytes from token to token. */
typedef struct {
    const char *query, *key, *value;
    char *context;
    int64_t query_step, key_step, value_step, context_step;
    int64_t num_tokens, head_size;
    int64_t words;        /* of a head: head_size, or half of it in bf16 */
    int64_t panels;       /* of a value */
    int64_t block;        /* keys taken at a time */
    int64_t window;       /* tokens further apart do not see each other; negative: all do */
    const float *bias;    /* [num_tokens, bias_step], added to scores; may be null */
    int64_t bias_step;
    float largest_bias;
    /* scratch */
    float *keys;          /* [block / PANEL][words][PANEL] */
    float *values;        /* [panels][block, or half of it in bf16][PANEL] */
    float *queries;       /* [ROWS][QUERY_STEP] */
    float *weights;       /* [ROWS][WEIGHT_STEP] */
    float *sums;          /* [num_tokens][LANES]: of the weights, or maxima of the scores */
    float *output;        /* [num_tokens][panels][PANEL]: weighted values */
    float *norms, *shift; /* [num_tokens] */
} Head;

INLINE __mmask16 first_lanes(int64_t count) {
    return count >= LANES ? 0xffff : count <= 0 ? 0 : (__mmask16)((1u << count) - 1);
}

static inline int64_t round_up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

/* 2^x by a polynomial around the nearest whole number: relative error 2e-9, or 8e-5 where bf16 rounds by 2e-3. */
INLINE __m512 exp2_of(__m512 x, int is_bf16) {
    __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 part = _mm512_sub_ps(x, whole), y;
    if (is_bf16) {
        y = _mm512_set1_ps(0.055171669f);
        y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(0.242611122f));
        y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(0.693260985f));
        y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(0.999928074f));
    } else {
        y = _mm512_set1_ps(0.00015345812f);
        y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(0.00133999312f));
        y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(0.00961848896f));
        y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(0.0555032878f));
        y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(0.240226469f));
        y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(0.693147206f));
        y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(1.0f));
    }
    return _mm512_scalef_ps(y, whole);
}

INLINE __m512 multiply_add(__m512 a, __m512 b, __m512 sum, int is_bf16) {
    return is_bf16 ? _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b) : _mm512_fmadd_ps(a, b, sum);
}

/* sum[r] += a[r] b: ROWS rows of words, `a_step` apart, with `words` rows of PANEL words. */
INLINE void multiply(__m512 sum[ROWS][2], const float *a, int64_t a_step, const float *b, int64_t words, int is_bf16) {
    for (int64_t w = 0; w < words; w++, b += PANEL) {
        __m512 left = _mm512_loadu_ps(b), right = _mm512_loadu_ps(b + LANES);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            __m512 x = _mm512_set1_ps(a[r * a_step + w]);
            sum[r][0] = multiply_add(x, left, sum[r][0], is_bf16);
            sum[r][1] = multiply_add(x, right, sum[r][1], is_bf16);
        }
    }
}

/* Row i of the result is word i of every row. */
INLINE void transpose(__m512 rows[LANES]) {
    __m512 pairs[LANES], fours[LANES];
#pragma GCC unroll 8
    for (int i = 0; i < LANES; i += 2) {
        pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < LANES; i += 2) { /* fours[4 g + c]: words c, c + 4, c + 8, c + 12 of rows 4 g .. 4 g + 3 */
        __m512d a = _mm512_castps_pd(pairs[i / 4 * 4 + i % 4 / 2]), b = _mm512_castps_pd(pairs[i / 4 * 4 + i % 4 / 2 + 2]);
        fours[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
        fours[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        __m512 even_top = _mm512_shuffle_f32x4(fours[c], fours[c + 4], 0x88);
        __m512 odd_top = _mm512_shuffle_f32x4(fours[c], fours[c + 4], 0xdd);
        __m512 even_low = _mm512_shuffle_f32x4(fours[c + 8], fours[c + 12], 0x88);
        __m512 odd_low = _mm512_shuffle_f32x4(fours[c + 8], fours[c + 12], 0xdd);
        rows[c] = _mm512_shuffle_f32x4(even_top, even_low, 0x88);
        rows[c + 4] = _mm512_shuffle_f32x4(odd_top, odd_low, 0x88);
        rows[c + 8] = _mm512_shuffle_f32x4(even_top, even_low, 0xdd);
        rows[c + 12] = _mm512_shuffle_f32x4(odd_top, odd_low, 0xdd);
    }
}

/* LANES words of a token's query or key, from word `first`; zeros behind the head and behind the last token. */
INLINE __m512 words_of(const Head *h, const char *tokens, int64_t step, int64_t token, int64_t first) {
    if (token >= h->num_tokens) return _mm512_setzero_ps();
    return _mm512_maskz_loadu_ps(first_lanes(h->words - first), (const float *)(tokens + token * step) + first);
}

/* Word w of PANEL keys side by side. */
INLINE void pack_keys(const Head *h, int64_t first, int64_t count) {
    for (int64_t k = 0; k < count; k += LANES)
        for (int64_t w = 0; w < h->words; w += LANES) {
            __m512 rows[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) rows[i] = words_of(h, h->key, h->key_step, first + k + i, w);
            transpose(rows);
            float *to = h->keys + (k / PANEL * h->words + w) * PANEL + k % PANEL;
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++)
                if (w + i < h->words) _mm512_storeu_ps(to + i * PANEL, rows[i]);
        }
}

/* PANEL numbers of a token's value in fp32; in bf16 of two tokens', number by number, as one word. */
INLINE void pack_values(const Head *h, int64_t first, int64_t count, int is_bf16) {
    static const uint16_t interleaved[2 * PANEL] = {
        0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
        11, 43, 12, 44, 13, 45, 14, 46, 15, 47, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53,
        22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
    const int64_t tokens = is_bf16 ? 2 : 1, steps = h->block / tokens;
    for (int64_t p = 0; p < h->panels; p++) {
        const int64_t left = h->head_size - p * PANEL;
        const __mmask32 numbers = left >= PANEL ? 0xffffffffu : (1u << left) - 1;
        float *to = h->values + p * steps * PANEL;
        for (int64_t k = 0; k < count; k += tokens, to += PANEL) {
            __m512i parts[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
            for (int64_t t = 0; t < tokens && first + k + t < h->num_tokens; t++) {
                const char *from = h->value + (first + k + t) * h->value_step;
                if (is_bf16) {
                    parts[t] = _mm512_maskz_loadu_epi16(numbers, from + p * PANEL * 2);
                } else {
                    parts[0] = _mm512_maskz_loadu_epi32((__mmask16)numbers, from + p * PANEL * 4);
                    parts[1] = _mm512_maskz_loadu_epi32((__mmask16)(numbers >> LANES), from + (p * PANEL + LANES) * 4);
                }
            }
            if (is_bf16) {
                __m512i low = _mm512_loadu_si512(interleaved), high = _mm512_loadu_si512(interleaved + PANEL);
                __m512i both = _mm512_permutex2var_epi16(parts[0], low, parts[1]);
                parts[1] = _mm512_permutex2var_epi16(parts[0], high, parts[1]);
                parts[0] = both;
            }
            _mm512_storeu_si512(to, parts[0]);
            _mm512_storeu_si512(to + LANES, parts[1]);
        }
    }
}

INLINE void copy_queries(const Head *h, int64_t row) {
    for (int64_t w = 0; w < h->words; w += LANES)
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
            _mm512_storeu_ps(h->queries + r * QUERY_STEP + w, words_of(h, h->query, h->query_step, row + r, w));
}

/* Whether none of ROWS queries sees any of `count` keys. */
INLINE int is_beyond(const Head *h, int64_t row, int64_t key, int64_t count) {
    return h->window >= 0 && (row - (key + count - 1) > h->window || key - (row + ROWS - 1) > h->window);
}

/* Scores of the copied queries with the packed keys from `first + k`, shifted. Returns whether every query sees every
   key; if not, `seen` says which. */
INLINE int scores_of(
    const Head *h, __m512 scores[ROWS][2], __mmask16 seen[ROWS][2], int64_t row, int64_t first, int64_t k, int is_bf16) {
    const int64_t key = first + k, last_row = h->num_tokens - 1;
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) scores[r][0] = scores[r][1] = _mm512_set1_ps(-h->shift[row + r]);
    multiply(scores, h->queries, QUERY_STEP, h->keys + k / PANEL * h->words * PANEL, h->words, is_bf16);
    if (h->bias)
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < 2; c++) {
                const float *bias = h->bias + (row + r < last_row ? row + r : last_row) * h->bias_step + key + c * LANES;
                __m512 added = _mm512_maskz_loadu_ps(first_lanes(h->num_tokens - key - c * LANES), bias);
                scores[r][c] = _mm512_add_ps(scores[r][c], added);
            }
    const int all_there = key + PANEL <= h->num_tokens;
    const int all_near = h->window < 0 || (key + PANEL - 1 - row <= h->window && row + ROWS - 1 - key <= h->window);
    if (all_there && all_near) return 1;
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < 2; c++) {
            const int64_t at = key + c * LANES;
            seen[r][c] = first_lanes(h->num_tokens - at);
            if (h->window >= 0)
                seen[r][c] &= first_lanes(row + r + h->window + 1 - at) & ~first_lanes(row + r - h->window - at);
        }
    return 0;
}

/* Squares of the tokens' norms, if asked for; returns the largest, or one that is not a number. */
INLINE float largest_norm(const Head *h, const char *tokens, int64_t step, float *norms, int is_bf16) {
    float largest = 0.0f;
    for (int64_t t = 0; t < h->num_tokens; t++) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t w = 0; w < h->words; w += LANES) {
            __m512 x = words_of(h, tokens, step, t, w);
            sum = multiply_add(x, x, sum, is_bf16);
        }
        const float norm = _mm512_reduce_add_ps(sum);
        if (norms) norms[t] = norm;
        if (!(norm <= largest)) largest = norm;
    }
    return largest;
}

INLINE int may_be_large(const Head *h, float query_norm, float key_norm) {
    return !(sqrtf(query_norm) * sqrtf(key_norm) + h->largest_bias <= LARGEST_SCORE);
}

/* Shifts: zero, but a row's largest score where rows may have large ones. */
INLINE void find_shifts(const Head *h, int is_bf16) {
    const int64_t n = h->num_tokens;
    memset(h->shift, 0, round_up(n, ROWS) * sizeof(float));
    const float key_norm = largest_norm(h, h->key, h->key_step, 0, is_bf16);
    const float query_norm = largest_norm(h, h->query, h->query_step, h->norms, is_bf16);
    if (!may_be_large(h, query_norm, key_norm)) return;
    for (int64_t i = 0; i < round_up(n, ROWS) * LANES; i++) h->sums[i] = -INFINITY;
    for (int64_t first = 0; first < n; first += h->block) {
        const int64_t count = n - first < h->block ? round_up(n - first, PANEL) : h->block;
        pack_keys(h, first, count);
        for (int64_t row = 0; row < n; row += ROWS) {
            int any = 0;
            for (int64_t r = row; r < row + ROWS && r < n; r++) any |= may_be_large(h, h->norms[r], key_norm);
            if (!any || is_beyond(h, row, first, count)) continue;
            copy_queries(h, row);
            for (int64_t k = 0; k < count; k += PANEL) {
                __m512 scores[ROWS][2];
                __mmask16 seen[ROWS][2];
                const int all = scores_of(h, scores, seen, row, first, k, is_bf16);
                for (int r = 0; r < ROWS; r++)
                    for (int c = 0; c < 2; c++) {
                        float *at = h->sums + (row + r) * LANES;
                        const __m512 most = _mm512_loadu_ps(at);
                        _mm512_storeu_ps(at, _mm512_mask_max_ps(most, all ? 0xffff : seen[r][c], most, scores[r][c]));
                    }
            }
        }
    }
    for (int64_t row = 0; row < n; row++) {
        const float most = _mm512_reduce_max_ps(_mm512_loadu_ps(h->sums + row * LANES));
        if (most != -INFINITY) h->shift[row] = most;
    }
}

/* 2^score of the copied queries with the packed keys, and their sums. */
INLINE void weigh(const Head *h, int64_t row, int64_t first, int64_t k, int is_bf16) {
    __m512 scores[ROWS][2];
    __mmask16 seen[ROWS][2];
    const int all = scores_of(h, scores, seen, row, first, k, is_bf16);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
        __m512 left = exp2_of(scores[r][0], is_bf16), right = exp2_of(scores[r][1], is_bf16);
        if (!all) {
            left = _mm512_maskz_mov_ps(seen[r][0], left);
            right = _mm512_maskz_mov_ps(seen[r][1], right);
        }
        float *sum = h->sums + (row + r) * LANES;
        _mm512_storeu_ps(sum, _mm512_add_ps(_mm512_loadu_ps(sum), _mm512_add_ps(left, right)));
        float *to = h->weights + r * WEIGHT_STEP + (is_bf16 ? k / 2 : k);
        if (is_bf16) {
            _mm512_storeu_ps(to, (__m512)_mm512_cvtne2ps_pbh(right, left));
        } else {
            _mm512_storeu_ps(to, left);
            _mm512_storeu_ps(to + LANES, right);
        }
    }
}

/* The weights of `count` keys times their values. */
INLINE void add_values(const Head *h, int64_t row, int64_t count, int is_bf16) {
    const int64_t tokens = is_bf16 ? 2 : 1, width = h->panels * PANEL;
    for (int64_t p = 0; p < h->panels; p++) {
        float *output = h->output + row * width + p * PANEL;
        __m512 sum[ROWS][2];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            sum[r][0] = _mm512_loadu_ps(output + r * width);
            sum[r][1] = _mm512_loadu_ps(output + r * width + LANES);
        }
        multiply(sum, h->weights, WEIGHT_STEP, h->values + p * (h->block / tokens) * PANEL, count / tokens, is_bf16);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            _mm512_storeu_ps(output + r * width, sum[r][0]);
            _mm512_storeu_ps(output + r * width + LANES, sum[r][1]);
        }
    }
}

INLINE void write_context(const Head *h, int is_bf16) {
    const int64_t width = h->panels * PANEL;
    for (int64_t row = 0; row < h->num_tokens; row++) {
        const __m512 total = _mm512_set1_ps(_mm512_reduce_add_ps(_mm512_loadu_ps(h->sums + row * LANES)));
        char *to = h->context + row * h->context_step;
        for (int64_t d = 0; d < h->head_size; d += LANES) {
            const __mmask16 numbers = first_lanes(h->head_size - d);
            const __m512 x = _mm512_div_ps(_mm512_loadu_ps(h->output + row * width + d), total);
            if (is_bf16) _mm256_mask_storeu_epi16(to + d * 2, numbers, (__m256i)_mm512_cvtneps_pbh(x));
            else _mm512_mask_storeu_ps(to + d * 4, numbers, x);
        }
    }
}

INLINE void attend_head(const Head *h, int is_bf16) {
    const int64_t n = h->num_tokens;
    find_shifts(h, is_bf16);
    memset(h->sums, 0, round_up(n, ROWS) * LANES * sizeof(float));
    memset(h->output, 0, round_up(n, ROWS) * h->panels * PANEL * sizeof(float));
    for (int64_t first = 0; first < n; first += h->block) {
        const int64_t count = n - first < h->block ? round_up(n - first, PANEL) : h->block;
        pack_keys(h, first, count);
        pack_values(h, first, count, is_bf16);
        for (int64_t row = 0; row < n; row += ROWS) {
            if (is_beyond(h, row, first, count)) continue;
            copy_queries(h, row);
            for (int64_t k = 0; k < count; k += PANEL) weigh(h, row, first, k, is_bf16);
            add_values(h, row, count, is_bf16);
        }
    }
    write_context(h, is_bf16);
}

/* Compiled once for each kind of number. */
static __attribute__((noinline, TARGET)) void attend_fp32(const Head *h) { attend_head(h, 0); }
static __attribute__((noinline, TARGET)) void attend_bf16(const Head *h) { attend_head(h, 1); }

API int belt_can_attend(int64_t head_size, int is_bf16) {
    __builtin_cpu_init();
    const int has_fp32 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (!has_fp32 || (is_bf16 && !__builtin_cpu_supports("avx512bf16"))) return 0;
    return head_size > 0 && head_size % (is_bf16 ? 2 : 1) == 0 && head_size / (is_bf16 ? 2 : 1) <= MOST_WORDS;
}

/* Steps are numbers from token to token; heads of a token lie side by side. Returns 0, or -1 without memory. */
API int belt_attend(
    const char *query, const char *key, const char *value, char *context,
    int64_t query_step, int64_t key_step, int64_t value_step, int64_t context_step,
    const int64_t *lengths, int64_t num_chunks, int64_t num_heads, int64_t head_size,
    int64_t window, const float *bias, int64_t bias_step, float largest_bias, int is_bf16) {
    const int64_t size = is_bf16 ? 2 : 4;
    int64_t longest = 0;
    for (int64_t c = 0; c < num_chunks; c++)
        if (lengths[c] > longest) longest = lengths[c];
    Head h = {
        .query_step = query_step * size, .key_step = key_step * size, .value_step = value_step * size,
        .context_step = context_step * size, .head_size = head_size, .words = head_size * size / 4,
        .panels = (head_size + PANEL - 1) / PANEL, .window = window, .bias_step = bias_step,
        .largest_bias = largest_bias};
    h.block = BLOCK_WORDS / h.words / PANEL * PANEL;
    if (h.block > MOST_KEYS) h.block = MOST_KEYS;

    const int64_t rows = round_up(longest, ROWS);
    float **parts[] = {&h.keys, &h.values, &h.queries, &h.weights, &h.sums, &h.output, &h.norms, &h.shift};
    const int64_t sizes[] = {
        h.block * h.words, h.block * h.panels * PANEL, ROWS * QUERY_STEP, ROWS * WEIGHT_STEP,
        rows * LANES, rows * h.panels * PANEL, rows, rows};
    int64_t total = 0;
    for (int i = 0; i < 8; i++) total += round_up(sizes[i], LANES);
    float *scratch = aligned_alloc(64, total * sizeof(float)), *at = scratch;
    if (!scratch) return -1;
    for (int i = 0; i < 8; at += round_up(sizes[i], LANES), i++) *parts[i] = at;

    int64_t first = 0;
    for (int64_t c = 0; c < num_chunks; first += lengths[c], c++)
        for (int64_t head = 0; head < num_heads; head++) {
            const int64_t offset = head * head_size * size;
            h.num_tokens = lengths[c];
            h.query = query + first * h.query_step + offset;
            h.key = key + first * h.key_step + offset;
            h.value = value + first * h.value_step + offset;
            h.context = context + first * h.context_step + offset;
            h.bias = bias ? bias + head * bias_step * bias_step : 0;
            if (is_bf16) attend_bf16(&h);
            else attend_fp32(&h);
        }
    free(scratch);
    return 0;
}

#else /* another processor or compiler: there is no kernel, and PyTorch's operators serve */

API int belt_can_attend(int64_t head_size, int is_bf16) {
    (void)head_size, (void)is_bf16;
    return 0;
}

#endif
