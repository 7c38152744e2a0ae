/* Matrix products of blocks that lie in the caches.

       c[i, j] (+)= scale[i] · Σ_t a[i, t] · b[t, j]        i < rows, j < columns, t < depth

   a is read one element at a time, with any two strides; the rows of b and c are contiguous, and their columns are a
   multiple of LANES. A tile of c stays in registers: ROWS[v] rows by v vectors, chosen so that the sums, v vectors of
   b and one element of a fit the register file and that there are enough sums to hide the latency of an addition.

   Included once per kind of operand, with
       PRODUCT(name)       the names to define
       ELEMENT             what a and b hold: `real`, or a pair of bfloat16 as one 32-bit word
       OPERAND             a vector of ELEMENTs
       MULTIPLY(c, a, b)   the sum c, increased by the products */

INLINE void PRODUCT(tile)(const int rows, const int vectors, long depth, const ELEMENT *a, long a_row, long a_step,
                          const ELEMENT *b, long b_step, real *c, long c_row, const real *scale, int add) {
    lanes sum[MOST_ROWS][MOST_VECTORS];
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int v = 0; v < vectors; v++) sum[i][v] = (lanes){0};
    for (long t = 0; t < depth; t++) {
        OPERAND row[MOST_VECTORS];
        UNROLL for (int v = 0; v < vectors; v++) row[v] = PRODUCT(load)(b + v * LANES);
        UNROLL for (int i = 0; i < rows; i++) {
            OPERAND x = PRODUCT(all)(a[i * a_row]);
            UNROLL for (int v = 0; v < vectors; v++) sum[i][v] = MULTIPLY(sum[i][v], x, row[v]);
        }
        a += a_step;
        b += b_step;
    }
    UNROLL for (int i = 0; i < rows; i++) {
        lanes factor = all(scale ? scale[i] : 1);
        UNROLL for (int v = 0; v < vectors; v++) {
            real *to = c + i * c_row + v * LANES;
            lanes value = sum[i][v] * factor;
            store(to, add ? load(to) + value : value);
        }
    }
}

#define CASE(r, v)                                                                              \
    case r:                                                                                     \
        PRODUCT(tile)(r, v, depth, a, a_row, a_step, b, b_step, c, c_row, scale, add);          \
        break;

/* All rows of `v` vectors of columns. */
#define COLUMN(v, most, CASES)                                                                                     \
    static __attribute__((noinline)) void PRODUCT(column##v)(                                                      \
        long rows, long depth, const ELEMENT *a, long a_row, long a_step, const ELEMENT *b, long b_step, real *c,  \
        long c_row, const real *scale, int add) {                                                                  \
        for (long tiles = (rows + most - 1) / most; tiles > 0; tiles--) { /* of nearly equal height */             \
            long height = (rows + tiles - 1) / tiles;                                                              \
            switch (height) { CASES(v) }                                                                           \
            rows -= height;                                                                                        \
            a += height * a_row;                                                                                   \
            c += height * c_row;                                                                                   \
            scale = scale ? scale + height : 0;                                                                    \
        }                                                                                                          \
    }

#if VECTOR_BYTES == 32 /* 16 registers */
COLUMN(1, 8, CASES8)
COLUMN(2, 6, CASES6)
COLUMN(3, 4, CASES4)
#else /* 32 registers */
COLUMN(1, 12, CASES12)
COLUMN(2, 12, CASES12)
COLUMN(3, 8, CASES8)
#endif

static void PRODUCT(product)(long rows, long columns, long depth, const ELEMENT *a, long a_row, long a_step,
                             const ELEMENT *b, long b_step, real *c, long c_row, const real *scale, int add) {
    long left = columns / LANES;
    while (left > 0) {
        /* Threes where they divide evenly or are all that fits an odd rest; twos otherwise. */
        long v = left == 1 ? 1 : left % 3 == 0 || left % 2 == 1 ? 3 : 2;
        switch (v) {
            case 1: PRODUCT(column1)(rows, depth, a, a_row, a_step, b, b_step, c, c_row, scale, add); break;
            case 2: PRODUCT(column2)(rows, depth, a, a_row, a_step, b, b_step, c, c_row, scale, add); break;
            case 3: PRODUCT(column3)(rows, depth, a, a_row, a_step, b, b_step, c, c_row, scale, add); break;
        }
        left -= v;
        b += v * LANES;
        c += v * LANES;
    }
}

#undef CASE
#undef COLUMN
#undef PRODUCT
#undef ELEMENT
#undef OPERAND
#undef MULTIPLY
