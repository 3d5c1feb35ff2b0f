/* cblas_{s,d,c}gemm for MLX's CPU backend, over scipy-openblas32, whose names have a prefix.

   A step of decoding multiplies a few rows by weights that come from memory. OpenBLAS's sgemm packs
   the whole weight first, which costs more than the product, and its sgemv reads it at half of the
   memory's speed. So few rows times a transposed weight, which is what a linear layer asks for, are
   multiplied here, as dot products: every weight is read once, for all rows. */

#include <stddef.h>

enum { ROW_MAJOR = 101, NO_TRANS = 111, TRANS = 112 };

/* Above so many rows, packing pays. */
enum { FEW_ROWS = 16 };

void scipy_cblas_sgemm(int, int, int, int, int, int, float, const float *, int, const float *, int,
                       float, float *, int);
void scipy_cblas_sgemv(int, int, int, int, float, const float *, int, const float *, int, float,
                       float *, int);
void scipy_cblas_dgemm(int, int, int, int, int, int, double, const double *, int, const double *,
                       int, double, double *, int);
void scipy_cblas_cgemm(int, int, int, int, int, int, const void *, const void *, int, const void *,
                       int, const void *, void *, int);

#if defined(__AVX512F__)
enum { LANES = 16 };
#elif defined(__AVX__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif

/* GCC's and Clang's vectors, which need no alignment of the memory they come from. */
typedef float vector __attribute__((vector_size(4 * LANES), aligned(4)));
typedef float vector4 __attribute__((vector_size(16)));

static inline float sum(vector v) {
    union {
        vector whole;
        vector4 quarters[LANES / 4];
    } parts = {v};
    vector4 total = parts.quarters[0];
    for (int i = 1; i < LANES / 4; i++)
        total += parts.quarters[i];
    return (total[0] + total[2]) + (total[1] + total[3]);
}

/* A tile of the product: ROWS rows of a by COLS rows of b, all in registers. While it is computed,
   the rows of b that come next are fetched. */
#define TILE(ROWS, COLS)                                                                           \
    static void tile_##ROWS##_##COLS(ptrdiff_t k, float alpha, const float *a, ptrdiff_t lda,      \
                                     const float *b, ptrdiff_t ldb, float *c, ptrdiff_t ldc) {     \
        vector sums[ROWS][COLS];                                                                   \
        ptrdiff_t at = 0;                                                                          \
        for (int row = 0; row < ROWS; row++)                                                       \
            for (int col = 0; col < COLS; col++)                                                   \
                sums[row][col] = (vector){0};                                                      \
        for (; at + LANES <= k; at += LANES) {                                                     \
            vector weights[COLS];                                                                  \
            for (int col = 0; col < COLS; col++) {                                                 \
                weights[col] = *(const vector *)(b + col * ldb + at);                              \
                __builtin_prefetch(b + (col + COLS) * ldb + at);                                   \
            }                                                                                      \
            for (int row = 0; row < ROWS; row++) {                                                 \
                vector x = *(const vector *)(a + row * lda + at);                                  \
                for (int col = 0; col < COLS; col++)                                               \
                    sums[row][col] += weights[col] * x;                                            \
            }                                                                                      \
        }                                                                                          \
        for (int row = 0; row < ROWS; row++)                                                       \
            for (int col = 0; col < COLS; col++) {                                                 \
                float total = sum(sums[row][col]);                                                 \
                for (ptrdiff_t rest = at; rest < k; rest++)                                        \
                    total += a[row * lda + rest] * b[col * ldb + rest];                            \
                c[row * ldc + col] = alpha * total;                                                \
            }                                                                                      \
    }

/* As many sums as there are registers for them: 32 with AVX-512, 16 otherwise. The tiles of one
   column are for the columns that are left over. */
#if defined(__AVX512F__)
enum { MOST_ROWS = 8 };
static const int COLUMNS[] = {8, 4, 4, 4, 4, 4, 3, 3};
TILE(1, 8) TILE(2, 4) TILE(3, 4) TILE(4, 4) TILE(5, 4) TILE(6, 4) TILE(7, 3) TILE(8, 3)
TILE(5, 1) TILE(6, 1) TILE(7, 1) TILE(8, 1)
#define TILES tile_1_8, tile_2_4, tile_3_4, tile_4_4, tile_5_4, tile_6_4, tile_7_3, tile_8_3
#define MORE_TILES , tile_5_1, tile_6_1, tile_7_1, tile_8_1
#else
enum { MOST_ROWS = 4 };
static const int COLUMNS[] = {8, 4, 3, 2};
TILE(1, 8) TILE(2, 4) TILE(3, 3) TILE(4, 2)
#define TILES tile_1_8, tile_2_4, tile_3_3, tile_4_2
#define MORE_TILES
#endif
TILE(1, 1) TILE(2, 1) TILE(3, 1) TILE(4, 1)

typedef void tile(ptrdiff_t, float, const float *, ptrdiff_t, const float *, ptrdiff_t, float *,
                  ptrdiff_t);

/* c[m, n] = alpha * a[m, k] * b[n, k] transposed, for a few rows of a. */
static void multiply_few(ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, float alpha, const float *a,
                         ptrdiff_t lda, const float *b, ptrdiff_t ldb, float *c, ptrdiff_t ldc) {
    static tile *const tiles[] = {TILES};
    static tile *const single[] = {tile_1_1, tile_2_1, tile_3_1, tile_4_1 MORE_TILES};
    ptrdiff_t groups = (m + MOST_ROWS - 1) / MOST_ROWS, rows = (m + groups - 1) / groups;
    ptrdiff_t cols = COLUMNS[rows - 1];
    for (ptrdiff_t col = 0; col < n; col += cols) {
        if (n - col < cols)
            cols = 1;
        tile *multiply = cols == 1 ? single[rows - 1] : tiles[rows - 1];
        for (ptrdiff_t row = 0; row < m; row += rows) {
            /* The last group begins earlier rather than being smaller: one tile does for all. */
            ptrdiff_t first = row + rows > m ? m - rows : row;
            multiply(k, alpha, a + first * lda, lda, b + col * ldb, ldb, c + first * ldc + col,
                     ldc);
        }
    }
}

void cblas_sgemm(int order, int trans_a, int trans_b, int m, int n, int k, float alpha,
                 const float *a, int lda, const float *b, int ldb, float beta, float *c, int ldc) {
    if (order == ROW_MAJOR && trans_a == NO_TRANS && trans_b == TRANS && m > 0 &&
        m <= FEW_ROWS && beta == 0) {
        multiply_few(m, n, k, alpha, a, lda, b, ldb, c, ldc);
        return;
    }
    if (order == ROW_MAJOR && m == 1 && (trans_a == NO_TRANS || lda == 1 || k == 1)) {
        /* The row a becomes the vector; op(B)^T applies to it. */
        int stride = trans_a == NO_TRANS ? 1 : lda;
        if (trans_b == TRANS)
            scipy_cblas_sgemv(ROW_MAJOR, NO_TRANS, n, k, alpha, b, ldb, a, stride, beta, c, 1);
        else
            scipy_cblas_sgemv(ROW_MAJOR, TRANS, k, n, alpha, b, ldb, a, stride, beta, c, 1);
        return;
    }
    scipy_cblas_sgemm(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

void cblas_dgemm(int order, int trans_a, int trans_b, int m, int n, int k, double alpha,
                 const double *a, int lda, const double *b, int ldb, double beta, double *c,
                 int ldc) {
    scipy_cblas_dgemm(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

void cblas_cgemm(int order, int trans_a, int trans_b, int m, int n, int k, const void *alpha,
                 const void *a, int lda, const void *b, int ldb, const void *beta, void *c,
                 int ldc) {
    scipy_cblas_cgemm(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
