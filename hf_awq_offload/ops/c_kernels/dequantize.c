/* Dequantizes a weight in the AWQ GEMM layout on a CPU. Compiled by c_library.py.

   The kernel converts a strip of 16 words, one cache line, into output channels, for up to 128 input channels of one
   group at a time. It transposes 16 × 16 bytes, after which each byte holds the codes of two output channels.

   Within a group, an output channel has only 16 values. In half precision these are computed once and looked up in two
   tables of 16 bytes, because rounding every weight would take longer than everything else. */

#include "words.h"

#define EACH_OF_8(first, step) first, first + step, first + 2 * step, first + 3 * step, first + 4 * step,             \
                               first + 5 * step, first + 6 * step, first + 7 * step
#define SHUFFLE_BYTES(a, b, ...) __builtin_shuffle(a, b, (bytes){__VA_ARGS__})
#define INTERLEAVED(a, b, first)                                                                                      \
    SHUFFLE_BYTES(a, b, first, first + 16, first + 1, first + 17, first + 2, first + 18, first + 3, first + 19,       \
                  first + 4, first + 20, first + 5, first + 21, first + 6, first + 22, first + 7, first + 23)

enum { STRIP_WORDS = 16, STRIP_DEPTH = 128, BYTES = 16 };

typedef uint8_t bytes VECTOR(uint8_t, BYTES);
typedef uint8_t half_bytes VECTOR(uint8_t, LANES);

/* Returns the codes of one word in the order of its output channels. */
INLINE floats codes_of_word(word bits) {
    const words shifts = {0, 16, 4, 20, 8, 24, 12, 28};
    return to_floats((((words){} + bits) >> shifts) & 15);
}

/* Transposes 16 × 16 bytes by interleaving the upper and the lower half of the rows four times. */
INLINE void transpose_bytes(bytes rows[16]) {
    UNROLL for (int round = 0; round < 4; round++) {
        bytes next[16];
        UNROLL for (int i = 0; i < 8; i++) {
            next[2 * i] = INTERLEAVED(rows[i], rows[i + 8], 0);
            next[2 * i + 1] = INTERLEAVED(rows[i], rows[i + 8], 8);
        }
        UNROLL for (int i = 0; i < 16; i++) rows[i] = next[i];
    }
}

/* Sets pairs[4j + b][k] to byte b of word first + j in row first_k + k: the codes of two output channels. */
static void read_pairs(const weight *w, int64_t first_k, int64_t depth, int64_t first, int64_t count,
                       uint8_t pairs[][STRIP_DEPTH]) {
    for (int64_t k = 0; k < depth; k += BYTES)
        for (int64_t j = 0; j < count; j += 4) {
            const word *corner = w->qweight + (first_k + k) * w->width + first + j;
            bytes rows[16];
            if (depth - k >= BYTES && count - j >= 4) {
                UNROLL for (int i = 0; i < 16; i++) {
                    __builtin_prefetch(corner + (i + BYTES) * w->width);
                    rows[i] = *(const bytes *)(corner + i * w->width);
                }
            } else {
                memset(rows, 0, sizeof(rows));
                for (int64_t i = 0; i < least(depth - k, BYTES); i++)
                    memcpy(&rows[i], corner + i * w->width, least(count - j, 4) * sizeof(word));
            }
            transpose_bytes(rows);
            UNROLL for (int i = 0; i < 16; i++) *(bytes *)&pairs[4 * j + i][k] = rows[i];
        }
}

/* Sets out[k] to the value of the code at bit `shift` of pairs[k]. `lower` has the values of codes 0 to 7, `upper` of
   8 to 15. */
INLINE void halves_of_codes(const uint8_t *pairs, int shift, int64_t depth, halves lower, halves upper, char *out) {
    bytes first = SHUFFLE_BYTES((bytes)lower, (bytes)upper, EACH_OF_8(0, 2), EACH_OF_8(16, 2));
    bytes second = SHUFFLE_BYTES((bytes)lower, (bytes)upper, EACH_OF_8(1, 2), EACH_OF_8(17, 2));
    for (int64_t k = 0; k < depth; k += BYTES) {
        bytes codes = (bytes)(*(const halves *)(pairs + k) >> shift); /* shuffles read only the lowest 4 bits of each */
        bytes a = __builtin_shuffle(first, codes), b = __builtin_shuffle(second, codes);
        *(bytes *)(out + 2 * k) = INTERLEAVED(a, b, 0);
        *(bytes *)(out + 2 * k + 16) = INTERLEAVED(a, b, 8);
    }
}

/* Does what halves_of_codes does in fp32, without a table. */
INLINE void floats_of_codes(const uint8_t *pairs, int shift, int64_t depth, float zero, float scale, char *out) {
    for (int64_t k = 0; k < depth; k += LANES) {
        halves codes = __builtin_convertvector(*(const half_bytes *)(pairs + k), halves);
        codes = codes >> shift & 15;
        *(floats *)(out + 4 * k) = (to_floats(__builtin_convertvector(codes, words)) - all(zero)) * all(scale);
    }
}

/* Dequantizes one output channel for `depth` input channels of one group; `depth` is a multiple of BYTES. */
INLINE void dequantize_run(const uint8_t *pairs, int shift, int64_t depth, float zero, float scale, int64_t dtype,
                           char *out) {
    if (dtype == FP32) {
        floats_of_codes(pairs, shift, depth, zero, scale, out);
        return;
    }
    floats lower = ((floats){EACH_OF_8(0, 1)} - all(zero)) * all(scale);
    floats upper = ((floats){EACH_OF_8(8, 1)} - all(zero)) * all(scale);
    if (dtype == BF16)
        halves_of_codes(pairs, shift, depth, bf16_of_floats(lower), bf16_of_floats(upper), out);
    else
        halves_of_codes(pairs, shift, depth, fp16_of_floats(lower), fp16_of_floats(upper), out);
}

/* Writes W[8 first : 8 last], (8 (last - first), K) in any of the dtypes: (q - z) · Δ in fp32, rounded once. */
void awq_dequantize(const word *qweight, const word *qzeros, const char *scales, int64_t scale_dtype,
                    int64_t in_features, int64_t width, int64_t group_size, int64_t first, int64_t last, char *out,
                    int64_t dtype, int64_t threads) {
    weight w = {qweight, qzeros, scales, scale_dtype, in_features, width, group_size};
    int64_t size = dtype == FP32 ? 4 : 2, strips = (last - first + STRIP_WORDS - 1) / STRIP_WORDS;
    int64_t runs_of_group = (group_size + STRIP_DEPTH - 1) / STRIP_DEPTH;
    int64_t runs = in_features / group_size * runs_of_group;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t task = 0; task < strips * runs; task++) {
        int64_t group = task % runs / runs_of_group, offset = task % runs_of_group * STRIP_DEPTH;
        int64_t first_k = group * group_size + offset, depth = least(STRIP_DEPTH, group_size - offset);
        int64_t from = first + task / runs * STRIP_WORDS, count = least(STRIP_WORDS, last - from);
        int64_t whole = depth / BYTES * BYTES;
        uint8_t pairs[4 * STRIP_WORDS][STRIP_DEPTH] __attribute__((aligned(64)));
        read_pairs(&w, first_k, depth, from, count, pairs);
        for (int64_t j = 0; j < count; j++) {
            floats scale = scales_at(&w, group, 8 * (from + j));
            floats zero = codes_of_word(qzeros[group * width + from + j]);
            for (int c = 0; c < 8; c++) {
                int nibble = nibble_of_column(c), shift = nibble % 2 * 4;
                const uint8_t *run = pairs[4 * j + nibble / 2];
                char *to = out + ((8 * (from - first + j) + c) * in_features + first_k) * size;
                dequantize_run(run, shift, whole, zero[c], scale[c], dtype, to);
                if (whole < depth) {
                    char rest[BYTES * sizeof(float)];
                    dequantize_run(run + whole, shift, BYTES, zero[c], scale[c], dtype, rest);
                    memcpy(to + whole * size, rest, (depth - whole) * size);
                }
            }
        }
    }
}
