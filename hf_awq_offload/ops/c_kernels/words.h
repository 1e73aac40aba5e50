/* Defines weights in the AWQ GEMM layout as the kernels read them, and the vector types for that.

   Word (k, i) holds the codes of input channel k and output channels 8i to 8i + 7, channel c in nibble
   {0, 4, 1, 5, 2, 6, 3, 7}[c]. Everything is computed in fp32. The code uses GCC's vector extension, not intrinsics, so
   that one source serves AVX2, AVX-512 and NEON.

   Shapes: M = rows of x, K = input channels, N = 8W = output channels, g = group size. Callers check all sizes. */

#include <stdint.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error the kernels read the bytes of a word in little-endian order
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

enum { LANES = 8 };
enum { FP16, BF16, FP32 };

/* Vectors may start at any address: tensors in a mapped file need not even be aligned to their elements. */
#define VECTOR(type, lanes) __attribute__((vector_size(sizeof(type) * (lanes)), aligned(1)))
typedef uint16_t halves VECTOR(uint16_t, LANES);
typedef uint32_t words VECTOR(uint32_t, LANES);
typedef int32_t integers VECTOR(int32_t, LANES);
typedef float floats VECTOR(float, LANES);

typedef uint32_t word __attribute__((aligned(1)));

typedef struct {
    const word *qweight; /* (K, W) */
    const word *qzeros;  /* (K / g, W) */
    const char *scales;  /* (K / g, 8W) */
    int64_t scale_dtype;
    int64_t in_features, width, group_size; /* K, W, g */
} weight;

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE int nibble_of_column(int column) { return column / 2 + column % 2 * 4; }

/* Puts `value` in all lanes. value - 0 compiles to a broadcast; value + 0 would be an addition, because of -0. */
INLINE floats all(float value) { return value - (floats){}; }

INLINE floats to_floats(words codes) { return __builtin_convertvector((integers)codes, floats); }

/* Returns `bits` where `condition` (the result of a comparison) holds, and 0 elsewhere. */
INLINE words where(integers condition, uint32_t bits) { return (words)condition & bits; }

INLINE floats floats_of_fp16(words bits) {
    floats magnitude = (floats)((bits & 0x7fff) << 13) * 0x1p112f; /* also correct for subnormal numbers */
    words infinite = where((bits & 0x7c00) == 0x7c00, 0x7f800000);
    return (floats)((words)magnitude | infinite | (bits & 0x8000) << 16);
}

INLINE halves bf16_of_floats(floats value) {
    words bits = (words)value, odd = bits >> 16 & 1;
    words rounded = (bits + 0x7fff + odd) >> 16; /* to nearest, ties to even */
    words not_a_number = where(value != value, 0xffff);
    return __builtin_convertvector((rounded & ~not_a_number) | (not_a_number & 0x7fc0), halves);
}

INLINE halves fp16_of_floats(floats value) {
    words bits = (words)value & 0x7fffffff, odd = bits >> 13 & 1;
    words normal = (bits + 0xfff - (112 << 23) + odd) >> 13;
    words subnormal = (words)((floats)bits + 0.5f) - 0x3f000000; /* the last bit of 0.5 is worth 2^-24 */
    words is_subnormal = where((integers)bits < 0x38800000, ~0u), is_infinite = where((integers)bits > 0x477fffff, ~0u);
    words rounded = (subnormal & is_subnormal) | (normal & ~is_subnormal & ~is_infinite) | (is_infinite & 0x7c00);
    return __builtin_convertvector(rounded | where(value != value, 0x7e00) | ((words)value >> 16 & 0x8000), halves);
}

/* Reads 8 numbers of any of the dtypes, from number `i` on. */
INLINE floats floats_at(const char *p, int64_t i, int64_t dtype) {
    if (dtype == FP32) return *(const floats *)(p + 4 * i);
    words bits = __builtin_convertvector(*(const halves *)(p + 2 * i), words);
    return dtype == BF16 ? (floats)(bits << 16) : floats_of_fp16(bits);
}

/* Writes 8 numbers of any of the dtypes, rounded to nearest, from number `i` on. */
INLINE void store_floats(floats value, char *p, int64_t i, int64_t dtype) {
    if (dtype == FP32)
        *(floats *)(p + 4 * i) = value;
    else
        *(halves *)(p + 2 * i) = dtype == BF16 ? bf16_of_floats(value) : fp16_of_floats(value);
}

/* Reads the scales of 8 consecutive output channels from `column` on. */
INLINE floats scales_at(const weight *w, int64_t group, int64_t column) {
    return floats_at(w->scales, group * w->width * 8 + column, w->scale_dtype);
}
