/* Trimmed means over clients by a sorting network, WIDTH coordinates at a time.

   Values are sorted as keys, in the order of the numbers. A coordinate where any value is NaN is marked by bits that
   make every key a NaN.

   Included once per kind of key, with
       NETWORK(name)   the names to define
       KEYS, WIDTH     a vector of keys, and how many it has
       HIGHEST         a key that no number's is above
   and NETWORK(load), NETWORK(key), NETWORK(is_nan), NETWORK(smaller), NETWORK(larger) and NETWORK(add) defined. */

#define EXCHANGE(i, j)                             \
    if (j < slots) {                               \
        KEYS low = NETWORK(smaller)(x[i], x[j]);   \
        x[j] = NETWORK(larger)(x[i], x[j]);        \
        x[i] = low;                                \
    }

/* to[i] = mean of the ranks trim … K − trim − 1 of the coordinates from `first` on. All values of a coordinate lie in
   registers: `slots`, a constant, is K rounded up to an even number, and what is left of it holds HIGHEST. */
INLINE void NETWORK(few)(const int slots, const struct aggregation *call, const void *const *rows, long first,
                         long count, float *to) {
    enum dtype dtype = (enum dtype)call->dtype;
    long clients = call->clients, trim = call->trim;
    for (long i = 0; i < count; i += WIDTH) {
        KEYS x[FEW_CLIENTS], sorted[FEW_CLIENTS], nan = {0};
        lanes sum[WIDTH / LANES_NUMBER] = {{0}};
        UNROLL for (int k = 0; k < slots; k++) {
            x[k] = HIGHEST;
            if (k == slots - 1 && k == clients) break;
            x[k] = NETWORK(load)(rows[k], first + i);
            __builtin_prefetch((const char *)rows[k] + (first + i) * size_of(dtype) + AHEAD);
            nan |= NETWORK(is_nan)(dtype, x[k]);
            x[k] = NETWORK(key)(x[k]);
        }
        MERGES_OF_1(EXCHANGE)
        if (slots > 2) { MERGES_OF_2(EXCHANGE) }
        if (slots > 4) { MERGES_OF_4(EXCHANGE) }
        if (slots > 8) { MERGES_OF_8(EXCHANGE) }
        UNROLL for (int k = 0; k < slots; k++) sorted[k] = x[k];
        for (long k = trim; k < clients - trim; k++) NETWORK(add)(dtype, sorted[k], nan, sum);
        UNROLL for (int v = 0; v < WIDTH / LANES_NUMBER; v++)
            store(to + i + v * LANES, sum[v] / all((float)(clients - 2 * trim)));
    }
}

/* The same for any K: a tile [K, columns] in the first-level cache, sorted row by row by `pairs`. */
static void NETWORK(many)(const struct aggregation *call, const void *const *rows, long first, long count, KEYS *tile,
                          float *to) {
    enum dtype dtype = (enum dtype)call->dtype;
    long clients = call->clients, columns = sorted_vectors(call);
    KEYS *nan = tile + clients * columns;
    for (long start = 0; start < count; start += columns * WIDTH) {
        long vectors = least(columns, (count - start) / WIDTH);
        memset(nan, 0, vectors * sizeof(KEYS));
        for (long k = 0; k < clients; k++)
            for (long i = 0; i < vectors; i++) {
                KEYS x = NETWORK(load)(rows[k], first + start + i * WIDTH);
                nan[i] |= NETWORK(is_nan)(dtype, x);
                tile[k * columns + i] = NETWORK(key)(x);
            }
        for (long p = 0; p < call->pair_count; p++) {
            KEYS *low = tile + call->pairs[2 * p] * columns, *high = tile + call->pairs[2 * p + 1] * columns;
            for (long i = 0; i < vectors; i++) {
                KEYS x = low[i], y = high[i];
                low[i] = NETWORK(smaller)(x, y);
                high[i] = NETWORK(larger)(x, y);
            }
        }
        for (long i = 0; i < vectors; i++) {
            lanes sum[WIDTH / LANES_NUMBER] = {{0}};
            for (long k = call->trim; k < clients - call->trim; k++)
                NETWORK(add)(dtype, tile[k * columns + i], nan[i], sum);
            UNROLL for (int v = 0; v < WIDTH / LANES_NUMBER; v++)
                store(to + start + i * WIDTH + v * LANES, sum[v] / all((float)(clients - 2 * call->trim)));
        }
    }
}

#define FEW(slots) \
    case slots: NETWORK(few)(slots, call, rows, first, count, to); break;

/* `count` coordinates, whole vectors of them. */
static void NETWORK(trim)(const struct aggregation *call, const void *const *rows, long first, long count, void *tile,
                          float *to) {
    switch (rounded_up(call->clients, 2)) {
        FEW(2) FEW(4) FEW(6) FEW(8) FEW(10) FEW(12) FEW(14) FEW(16)
        default: NETWORK(many)(call, rows, first, count, tile, to);
    }
}

#undef EXCHANGE
#undef FEW
#undef NETWORK
#undef KEYS
#undef WIDTH
#undef HIGHEST
