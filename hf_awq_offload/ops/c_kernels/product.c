/* Multiplies by a weight in the AWQ GEMM layout on a CPU. Compiled by c_library.py.

   The kernels process blocks of 8 words, 64 output channels, in "nibble order": vector i holds nibble i of the 8 words,

       (words & 0xF << 4i), as float  =  16^i · codes

   which needs no shift, because the scales are multiplied by 16^-i. Lane j of vector i is output channel 8j + channel
   of nibble i, so transposing an 8 × 8 matrix once per product restores the natural order. */

#include "words.h"

enum { BLOCK_WORDS = 8, BLOCK_COLUMNS = 64, MOST_DEPTH = 32, ONE_ROW_DEPTH = 16, ROWS_AT_ONCE = 6 };

#ifndef WIDE_LANES
#ifdef __AVX512F__
#define WIDE_LANES 16
#else
#define WIDE_LANES 8
#endif
#endif
typedef float wide_floats VECTOR(float, WIDE_LANES); /* as wide as the CPU's multiplications */

INLINE wide_floats all_wide(float value) { return value - (wide_floats){}; }

INLINE int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

/* Reads `count` words; if they are fewer than 8, the rest are 0. */
INLINE words words_at(const word *p, int64_t count) {
    words result = {};
    if (count >= BLOCK_WORDS) return *(const words *)p;
    memcpy(&result, p, count * sizeof(word));
    return result;
}

/* Returns nibble i of 8 words times 16^i; nibble 7 is not multiplied, because it would be negative. */
INLINE floats nibble(words block, int i) { return to_floats(i == 7 ? block >> 28 : block & 15u << 4 * i); }

/* Returns how far ahead of word `i` of a row to prefetch while columns `first` to `last` are read, `depth` rows at a
   time: four blocks, or, past the last block, the start of the row `depth` rows below. Rows lie so far apart that no
   CPU predicts which is read next. */
INLINE int64_t words_ahead(const weight *w, int64_t i, int64_t first, int64_t last, int64_t depth) {
    int64_t ahead = 4 * BLOCK_WORDS;
    return i + ahead < last ? ahead : ahead - (last - first) + depth * w->width;
}

/* -- nibble order ------------------------------------------------------------------------------------------------- */

#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (integers){__VA_ARGS__})
#define EXCHANGE(i, j, FIRST, SECOND)                                                                                 \
    {                                                                                                                 \
        floats a = rows[i], b = rows[j];                                                                              \
        rows[i] = SHUFFLE(a, b, FIRST);                                                                               \
        rows[j] = SHUFFLE(a, b, SECOND);                                                                              \
    }
#define LIST(...) __VA_ARGS__

/* Transposes an 8 × 8 matrix by exchanging its off-diagonal 1 × 1, then 2 × 2, then 4 × 4 blocks. */
INLINE void transpose(floats rows[8]) {
    UNROLL for (int i = 0; i < 8; i += 2)
        EXCHANGE(i, i + 1, LIST(0, 8, 2, 10, 4, 12, 6, 14), LIST(1, 9, 3, 11, 5, 13, 7, 15))
    UNROLL for (int i = 0; i < 8; i++) if (!(i & 2))
        EXCHANGE(i, i + 2, LIST(0, 1, 8, 9, 4, 5, 12, 13), LIST(2, 3, 10, 11, 6, 7, 14, 15))
    UNROLL for (int i = 0; i < 4; i++)
        EXCHANGE(i, i + 4, LIST(0, 1, 2, 3, 8, 9, 10, 11), LIST(4, 5, 6, 7, 12, 13, 14, 15))
}

/* Computes `scale` and `zero` for one group of one block: (q - z) · Δ = q_i · scale[i] - zero[i] in nibble order, with
   q_i as `nibble` returns it. */
INLINE void block_parameters(const weight *w, int64_t group, int64_t first, int64_t count, floats scale[8],
                             floats zero[8]) {
    floats rows[8] = {};
    for (int j = 0; j < count; j++) rows[j] = scales_at(w, group, 8 * (first + j));
    transpose(rows);
    words zeros = words_at(w->qzeros + group * w->width + first, count);
    UNROLL for (int c = 0; c < 8; c++) {
        int i = nibble_of_column(c);
        scale[i] = rows[c] * (i == 7 ? 1.0f : 1.0f / (float)(1u << 4 * i));
        zero[i] = nibble(zeros, i) * scale[i];
    }
}

/* Writes one row of a block, which is in nibble order, to 8 · `count` output channels of y from `column` on. */
INLINE void store_block(const float *block, int64_t count, char *y, int64_t column, int64_t dtype) {
    floats rows[8];
    UNROLL for (int c = 0; c < 8; c++) rows[c] = *(const floats *)(block + LANES * nibble_of_column(c));
    transpose(rows);
    for (int j = 0; j < count; j++) store_floats(rows[j], y, column + 8 * j, dtype);
}

/* -- one row ------------------------------------------------------------------------------------------------------ */

/* Adds x · codes to `sums` for input channels first_k to last_k of one block. `words_ahead` returns `ahead`. */
INLINE void add_codes(const weight *w, const float *x, int64_t first_k, int64_t last_k, int64_t first, int64_t count,
                      int64_t ahead, float *sums) {
    floats sum[8] = {}; /* over these channels alone, because short sums are more precise */
    for (int64_t k = first_k; k < last_k; k++) {
        const word *row = w->qweight + k * w->width + first;
        __builtin_prefetch(row + ahead);
        words block = words_at(row, count);
        floats value = all(x[k]);
        UNROLL for (int i = 0; i < 8; i++) sum[i] += value * nibble(block, i);
    }
    UNROLL for (int i = 0; i < 8; i++) *(floats *)(sums + LANES * i) += sum[i];
}

/* Computes y[8 first : 8 last] for M = 1. `scratch` holds twice as many floats, rounded up to whole blocks.

   The kernel sums x · codes over a group; then y += Δ (sums - z Σ x). */
static void one_row(const weight *w, const float *x, char *y, int64_t dtype, int64_t first, int64_t last,
                    float *scratch) {
    int64_t size = round_up(last - first, BLOCK_WORDS) * 8;
    float *sums = scratch, *total = scratch + size;
    memset(total, 0, size * sizeof(float));
    for (int64_t group_k = 0; group_k < w->in_features; group_k += w->group_size) {
        int64_t end_k = group_k + w->group_size;
        memset(sums, 0, size * sizeof(float));
        for (int64_t k = group_k; k < end_k; k += ONE_ROW_DEPTH) {
            int64_t last_k = least(k + ONE_ROW_DEPTH, end_k), i = first;
            float *block = sums;
            for (; i + BLOCK_WORDS <= last; i += BLOCK_WORDS, block += BLOCK_COLUMNS)
                add_codes(w, x, k, last_k, i, BLOCK_WORDS, words_ahead(w, i, first, last, ONE_ROW_DEPTH), block);
            if (i < last) add_codes(w, x, k, last_k, i, last - i, BLOCK_WORDS, block);
        }
        double x_sum = 0;
        for (int64_t k = group_k; k < end_k; k++) x_sum += x[k];
        for (int64_t i = first; i < last; i += BLOCK_WORDS) {
            floats scale[8], zero[8];
            block_parameters(w, group_k / w->group_size, i, least(last - i, BLOCK_WORDS), scale, zero);
            UNROLL for (int j = 0; j < 8; j++) {
                int64_t at = (i - first) * 8 + LANES * j;
                *(floats *)(total + at) += scale[j] * *(floats *)(sums + at) - zero[j] * (float)x_sum;
            }
        }
    }
    for (int64_t i = first; i < last; i += BLOCK_WORDS)
        store_block(total + (i - first) * 8, least(last - i, BLOCK_WORDS), y, 8 * i, dtype);
}

/* -- several rows ------------------------------------------------------------------------------------------------- */

/* Adds x · tile to y for `rows` rows: x (rows, depth), tile (depth, 64), y (rows, 64) with row stride `stride`. `rows`
   is a constant wherever this is inlined. */
INLINE void multiply_rows(int rows, int64_t depth, const float *x, const float *tile, float *y, int64_t stride) {
    for (int column = 0; column < BLOCK_COLUMNS; column += 2 * WIDE_LANES) {
        wide_floats left[ROWS_AT_ONCE] = {}, right[ROWS_AT_ONCE] = {};
        float *out = y + column;
        for (int64_t k = 0; k < depth; k++) {
            const float *codes = tile + k * BLOCK_COLUMNS + column;
            wide_floats a = *(const wide_floats *)codes, b = *(const wide_floats *)(codes + WIDE_LANES);
            UNROLL for (int m = 0; m < rows; m++) {
                wide_floats value = all_wide(x[m * depth + k]);
                left[m] += value * a;
                right[m] += value * b;
            }
        }
        UNROLL for (int m = 0; m < rows; m++) {
            *(wide_floats *)(out + m * stride) += left[m];
            *(wide_floats *)(out + m * stride + WIDE_LANES) += right[m];
        }
    }
}

/* Adds x · tile to y for all rows, in passes of nearly equal size that fit into the registers. */
static void multiply_tile(int64_t rows, int64_t depth, const float *x, const float *tile, float *y, int64_t stride) {
    for (int64_t passes = (rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE; passes; passes--) {
        int64_t now = (rows + passes - 1) / passes;
        switch (now) {
            case 1: multiply_rows(1, depth, x, tile, y, stride); break;
            case 2: multiply_rows(2, depth, x, tile, y, stride); break;
            case 3: multiply_rows(3, depth, x, tile, y, stride); break;
            case 4: multiply_rows(4, depth, x, tile, y, stride); break;
            case 5: multiply_rows(5, depth, x, tile, y, stride); break;
            default: multiply_rows(ROWS_AT_ONCE, depth, x, tile, y, stride);
        }
        x += now * depth, y += now * stride, rows -= now;
    }
}

/* Dequantizes `depth` input channels of one block to `tile`, (depth, 64) in nibble order. */
INLINE void make_tile(const weight *w, int64_t first_k, int64_t depth, int64_t first, int64_t count, int64_t ahead,
                      float *tile) {
    floats scale[8], zero[8];
    block_parameters(w, first_k / w->group_size, first, count, scale, zero);
    for (int64_t k = 0; k < depth; k++, tile += BLOCK_COLUMNS) {
        const word *row = w->qweight + (first_k + k) * w->width + first;
        __builtin_prefetch(row + ahead);
        words block = words_at(row, count);
        UNROLL for (int i = 0; i < 8; i++) *(floats *)(tile + LANES * i) = nibble(block, i) * scale[i] - zero[i];
    }
}

/* Computes y[:, 8 first : 8 last] for M = `rows`. x: (K / depth, M, depth), where depth divides g. `scratch` holds as
   many floats as the result, rounded up to whole blocks. */
static void several_rows(const weight *w, const float *x, int64_t rows, int64_t depth, char *y, int64_t dtype,
                         int64_t first, int64_t last, float *scratch) {
    int64_t stride = round_up(last - first, BLOCK_WORDS) * 8;
    float tile[MOST_DEPTH * BLOCK_COLUMNS] __attribute__((aligned(64)));
    memset(scratch, 0, rows * stride * sizeof(float));
    for (int64_t k = 0; k < w->in_features; k += depth)
        for (int64_t i = first; i < last; i += BLOCK_WORDS) {
            if (last - i >= BLOCK_WORDS) /* with a constant, the compiler drops the other case */
                make_tile(w, k, depth, i, BLOCK_WORDS, words_ahead(w, i, first, last, depth), tile);
            else
                make_tile(w, k, depth, i, last - i, BLOCK_WORDS, tile);
            multiply_tile(rows, depth, x + k * rows, tile, scratch + (i - first) * 8, stride);
        }
    for (int64_t m = 0; m < rows; m++)
        for (int64_t i = first; i < last; i += BLOCK_WORDS)
            store_block(scratch + m * stride + (i - first) * 8, least(last - i, BLOCK_WORDS), y,
                        (m * w->width + i) * 8, dtype);
}

/* -- entry point -------------------------------------------------------------------------------------------------- */

/* Writes x[:, first_k : first_k + depth] to `slice`, (M, depth) fp32. */
static void read_slice(const char *x, int64_t rows, int64_t in_features, int64_t dtype, int64_t first_k, int64_t depth,
                       float *slice) {
    for (int64_t m = 0; m < rows; m++, slice += depth) {
        int64_t at = m * in_features + first_k, k = 0;
        for (; k + LANES <= depth; k += LANES) *(floats *)(slice + k) = floats_at(x, at + k, dtype);
        if (k < depth) { /* depth is 1, 2 or 4 */
            char rest[LANES * sizeof(float)] = {};
            int64_t size = dtype == FP32 ? 4 : 2;
            memcpy(rest, x + at * size, depth * size);
            floats value = floats_at(rest, 0, dtype);
            memcpy(slice, &value, depth * sizeof(float));
        }
    }
}

/* Computes y (M, N) = x Wᵀ for x (M, K), both of `dtype`; sums in fp32 and rounds once.

   The columns of words are divided into parts, at least one per thread, so that the sums of a part fit into
   `cache_bytes`. `scratch` holds M K + max(M, 2) · round_up(W, 8) · 8 floats: x in slices, and the sums. */
void awq_product(const word *qweight, const word *qzeros, const char *scales, int64_t scale_dtype, int64_t in_features,
                 int64_t width, int64_t group_size, const char *x, int64_t rows, int64_t dtype, char *y, float *scratch,
                 int64_t cache_bytes, int64_t threads) {
    weight w = {qweight, qzeros, scales, scale_dtype, in_features, width, group_size};
    int64_t depth = MOST_DEPTH, copies = rows > 2 ? rows : 2;
    while (group_size % depth) depth /= 2;
    float *slices = scratch, *sums = scratch + rows * in_features;
    int64_t parts = round_up(copies * width * 8 * sizeof(float) / cache_bytes + 1, threads);
    int64_t part_width = round_up((width + parts - 1) / parts, BLOCK_WORDS);
    parts = (width + part_width - 1) / part_width;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t k = 0; k < in_features; k += depth)
            read_slice(x, rows, in_features, dtype, k, depth, slices + k * rows);
#pragma omp for schedule(static)
        for (int64_t part = 0; part < parts; part++) {
            int64_t first = part * part_width, last = least(first + part_width, width);
            float *own = sums + first * 8 * copies;
            if (rows == 1)
                one_row(&w, slices, y, dtype, first, last, own);
            else
                several_rows(&w, slices, rows, depth, y, dtype, first, last, own);
        }
    }
}
