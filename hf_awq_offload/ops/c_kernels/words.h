/* Weights in the AWQ GEMM layout as the kernels read them, and vectors for it.

   Word (k, i) holds the codes of input channel k and output channels 8i to 8i + 7, channel c in nibble
   {0, 4, 1, 5, 2, 6, 3, 7}[c]. Everything is computed in fp32. GCC's vector extension stands in for intrinsics, so that
   one text serves AVX2, AVX-512 and NEON.

   Shapes: M = rows of x, K = input channels, N = 8W = output channels, g = group size. Sizes are checked by callers. */

#include <stdint.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error the kernels read the bytes of a word from the lowest on
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

enum { LANES = 8 };
enum { FP16, BF16, FP32 };

/* Vectors at any address: tensors in a mapped file need not even be aligned to their elements. */
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
    int64_t in_features, width, group_size; /* K, W, g */
    int64_t scale_dtype;
} weight;

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE int nibble_of_column(int column) { return column / 2 + column % 2 * 4; }

/* `value` in all lanes: value - 0 is a mere broadcast; value + 0 is an addition, because of -0. */
INLINE floats all(float value) { return value - (floats){}; }

INLINE floats to_floats(words codes) { return __builtin_convertvector((integers)codes, floats); }

/* Bits where `condition` holds (a comparison's result), else 0. */
INLINE words where(integers condition, uint32_t bits) { return (words)condition & bits; }

INLINE floats floats_of_fp16(words bits) {
    floats magnitude = (floats)((bits & 0x7fff) << 13) * 0x1p112f; /* right for subnormal numbers, too */
    words infinite = where((bits & 0x7c00) == 0x7c00, 0x7f800000);
    return (floats)((words)magnitude | infinite | (bits & 0x8000) << 16);
}

/* Scales of 8 consecutive output channels from `column`. */
INLINE floats scales_at(const weight *w, int64_t group, int64_t column) {
    int64_t i = group * w->width * 8 + column;
    if (w->scale_dtype == FP32) return *(const floats *)(w->scales + 4 * i);
    words bits = __builtin_convertvector(*(const halves *)(w->scales + 2 * i), words);
    return w->scale_dtype == BF16 ? (floats)(bits << 16) : floats_of_fp16(bits);
}
