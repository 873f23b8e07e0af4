/* Multi-head self-attention on CPU, forwards and backwards, for heads of any width; made for the narrow ones (2 to 64).

   A matrix product of inner width 2 to 29 leaves a CPU's vector units mostly empty when the width is what they run along. Here the
   lanes are queries: a block of queries against one key at a time, so that scores, their exponentials and their sums fill every lane
   at any width, a row's maximum and sum need no step across lanes, and a block's scores stay in the nearest caches. Only the
   gradients of keys and values run along the width. The backward computes the scores anew from the logarithm of each row's sum
   (as arXiv:2205.14135 does); nothing of size N x N is kept.

   All arithmetic is float32; input and output may be bfloat16. One (image, head) is one piece of work for one thread, so the digits do
   not depend on the number of threads.

   qkv is (B, N, 3, H, d) and out (B, N, H, d), both contiguous; lse is (B, H, N): log2 of each row's sum of 2^(scores log2 e). */

#include "lanes.h"

#if LANES == 16
#define MOST 3   /* vectors of queries side by side */
#define KEYS 6   /* keys at a time for the scores */
#define WIDTH 8  /* channels at a time for a product with scores */
#elif LANES == 8
#define MOST 2
#define KEYS 3
#define WIDTH 4
#else
#define MOST 3
#define KEYS 4
#define WIDTH 6
#endif

/* A row of d numbers, of float32 (bf16 = 0) or bfloat16, at element offset `at`. */
INLINE void load_row(float *to, const void *from, size_t at, int d, int bf16) {
    if (!bf16) {
        memcpy(to, (const float *)from + at, sizeof(float) * d);
        return;
    }
    const uint16_t *row = (const uint16_t *)from + at;
    for (int c = 0; c < d; c++) to[c] = from_bf16(row[c]);
}

INLINE void store_row(void *to, size_t at, const float *from, int d, int bf16) {
    if (!bf16) {
        memcpy((float *)to + at, from, sizeof(float) * d);
        return;
    }
    uint16_t *row = (uint16_t *)to + at;
    for (int c = 0; c < d; c++) row[c] = to_bf16(from[c]);
}

/* Rows [first, first + rows) of one of q, k, v (what = 0, 1, 2) of one head, pitch floats apart, times a factor. */
INLINE void load_rows(float *to, int pitch, const void *qkv, size_t base, size_t step, int first, int rows, int d, float factor, int bf16) {
    for (int i = 0; i < rows; i++) {
        float *row = to + (size_t)i * pitch;
        load_row(row, qkv, base + (size_t)(first + i) * step, d, bf16);
        if (factor != 1.0f)
            for (int c = 0; c < d; c++) row[c] *= factor;
    }
}

/* (rows, pitch) -> (d, lanes): channel c of all rows side by side; lanes without a row are 0. */
INLINE void across(float *to, int lanes, const float *from, int pitch, int rows, int d) {
    for (int c = 0; c < d; c++) {
        for (int i = 0; i < rows; i++) to[c * lanes + i] = from[(size_t)i * pitch + c];
        for (int i = rows; i < lanes; i++) to[c * lanes + i] = 0.0f;
    }
}

/* scores[j] = sum_c k[j][c] qt[c] for `num` keys, M vectors of queries. */
INLINE void scores_tile(int M, int num, vec *s, const float *k, int pitch, const vec *qt, int d) {
    vec acc[KEYS][MOST];
    for (int j = 0; j < num; j++)
        for (int m = 0; m < M; m++) acc[j][m] = same(0.0f);
    for (int c = 0; c < d; c++)
        for (int j = 0; j < num; j++) {
            vec key = same(k[(size_t)j * pitch + c]);
            for (int m = 0; m < M; m++) acc[j][m] += key * qt[c * M + m];
        }
    for (int j = 0; j < num; j++)
        for (int m = 0; m < M; m++) s[j * M + m] = acc[j][m];
}

INLINE void scores(int M, vec *s, const float *k, int pitch, const vec *qt, int N, int d) {
    int j = 0;
    for (; j + KEYS <= N; j += KEYS) scores_tile(M, KEYS, s + (size_t)j * M, k + (size_t)j * pitch, pitch, qt, d);
    for (; j < N; j++) scores_tile(M, 1, s + (size_t)j * M, k + (size_t)j * pitch, pitch, qt, d);
}

/* ot[c] = sum_j p[j] v[j][c] for W channels from `first` on. */
INLINE void mix_tile(int M, int W, vec *ot, const vec *p, const float *v, int pitch, int N, int first) {
    vec acc[WIDTH][MOST];
    for (int c = 0; c < W; c++)
        for (int m = 0; m < M; m++) acc[c][m] = same(0.0f);
    for (int j = 0; j < N; j++)
        for (int c = 0; c < W; c++) {
            vec value = same(v[(size_t)j * pitch + first + c]);
            for (int m = 0; m < M; m++) acc[c][m] += value * p[(size_t)j * M + m];
        }
    for (int c = 0; c < W; c++)
        for (int m = 0; m < M; m++) ot[(first + c) * M + m] = acc[c][m];
}

INLINE void mix(int M, vec *ot, const vec *p, const float *v, int pitch, int N, int d) {
    int tiles = (d + WIDTH - 1) / WIDTH, first = 0;
    for (int t = 0; t < tiles; t++) { /* tiles as equal as they get */
        int W = (d - first + tiles - t - 1) / (tiles - t);
        switch (W) {
#define CASE(n) case n: mix_tile(M, n, ot, p, v, pitch, N, first); break;
            CASE(1) CASE(2) CASE(3) CASE(4)
#if WIDTH >= 6
            CASE(5) CASE(6)
#endif
#if WIDTH >= 8
            CASE(7) CASE(8)
#endif
#undef CASE
        }
        first += W;
    }
}

/* out[j] += sum_i p[j][i] rows[i] for `num` keys: along the width, C vectors of it from `first` on, of P that a row has. */
INLINE void spread_tile(int C, int num, int P, int first, vec *out, const float *p, int lanes, const vec *rows, int count) {
    vec acc[12][4];
    for (int j = 0; j < num; j++)
        for (int c = 0; c < C; c++) acc[j][c] = out[j * P + first + c];
    for (int i = 0; i < count; i++) {
        vec row[4];
        for (int c = 0; c < C; c++) row[c] = rows[i * P + first + c];
        for (int j = 0; j < num; j++) {
            vec weight = same(p[(size_t)j * lanes + i]);
            for (int c = 0; c < C; c++) acc[j][c] += weight * row[c];
        }
    }
    for (int j = 0; j < num; j++)
        for (int c = 0; c < C; c++) out[j * P + first + c] = acc[j][c];
}

INLINE void spread_by(int C, int num, int P, int first, vec *out, const float *p, int lanes, const vec *rows, int count, int N) {
    int j = 0;
    for (; j + num <= N; j += num)
        spread_tile(C, num, P, first, out + (size_t)j * P, p + (size_t)j * lanes, lanes, rows, count);
    for (; j < N; j++) spread_tile(C, 1, P, first, out + (size_t)j * P, p + (size_t)j * lanes, lanes, rows, count);
}

static void spread(int P, vec *out, const float *p, int lanes, const vec *rows, int count, int N) {
    for (int first = 0; first < P; first += 4) switch (P - first) {
        case 1: spread_by(1, LANES == 8 ? 6 : 12, P, first, out, p, lanes, rows, count, N); break;
        case 2: spread_by(2, LANES == 8 ? 4 : 8, P, first, out, p, lanes, rows, count, N); break;
        case 3: spread_by(3, LANES == 8 ? 3 : 6, P, first, out, p, lanes, rows, count, N); break;
        default: spread_by(4, LANES == 8 ? 2 : 4, P, first, out, p, lanes, rows, count, N); break;
    }
}

static size_t whole(size_t floats) { return (floats + 15) / 16 * 16; }

/* One head, forwards, a block of `rows` <= M * LANES queries from `first` on. */
INLINE void forward_block(int M, const float *k, const float *v, float *work, void *out, float *lse, const void *qkv, size_t base,
                          size_t step, size_t out_base, size_t out_step, int first, int rows, int N, int d, float factor, int bf16) {
    const int lanes = M * LANES;
    float *q = work, *qt = q + whole((size_t)lanes * d), *s = qt + (size_t)lanes * d, *ot = s + (size_t)N * lanes;
    load_rows(q, d, qkv, base, step, first, rows, d, factor, bf16);
    across(qt, lanes, q, d, rows, d);
    scores(M, (vec *)s, k, d, (const vec *)qt, N, d);
    vec most[MOST], sum[MOST]; /* a score that is not finite makes its row's sum not a number, as a softmax does */
    vec *sv = (vec *)s;
    for (int m = 0; m < M; m++) most[m] = sv[m], sum[m] = same(0.0f);
    for (int j = 0; j < N; j++)
        for (int m = 0; m < M; m++) {
            vec x = sv[(size_t)j * M + m];
            most[m] = larger(x, most[m]);
            sum[m] += x * same(0.0f);
        }
    for (int j = 0; j < N; j++)
        for (int m = 0; m < M; m++) {
            vec p = exp2v(sv[(size_t)j * M + m] - most[m]);
            sv[(size_t)j * M + m] = p;
            sum[m] += p;
        }
    mix(M, (vec *)ot, sv, v, d, N, d);
    float top[MOST * LANES], total[MOST * LANES], row[256];
    memcpy(top, most, 4 * lanes);
    memcpy(total, sum, 4 * lanes);
    for (int i = 0; i < rows; i++) {
        float share = 1.0f / total[i];
        for (int c = 0; c < d; c++) row[c] = ot[c * lanes + i] * share;
        store_row(out, out_base + (size_t)(first + i) * out_step, row, d, bf16);
        lse[first + i] = total[i] == total[i] ? top[i] + __builtin_log2f(total[i]) : __builtin_nanf("");
    }
}

/* (B, N, 3, H, d) -> out (B, N, H, d), lse (B, H, N). Returns 0, or 1 where memory ran out. */
int eit_attention_forward(const void *qkv, void *out, float *lse, int64_t B, int64_t N, int64_t H, int64_t d, float scale, int bf16,
                          int threads) {
    const float factor = scale * 1.44269504088896340736f;
    const size_t step = (size_t)3 * H * d, out_step = (size_t)H * d;
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        size_t lanes = MOST * LANES, rows = whole((size_t)N * d);
        float *memory = aligned_alloc(64, sizeof(float) * (2 * rows + whole(lanes * d) + lanes * (2 * d + N) + 64));
        if (memory == NULL) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t piece = 0; piece < B * H; piece++) {
            if (memory == NULL) continue;
            const int64_t b = piece / H, h = piece % H;
            float *k = memory, *v = k + rows, *work = v + rows;
            const size_t base = ((size_t)b * N * 3 * H + h) * d, out_base = ((size_t)b * N * H + h) * d;
            load_rows(k, d, qkv, base + (size_t)H * d, step, 0, N, d, 1.0f, bf16);
            load_rows(v, d, qkv, base + (size_t)2 * H * d, step, 0, N, d, 1.0f, bf16);
            for (int first = 0; first < N;) {
                int left = N - first, vectors = (left + LANES - 1) / LANES;
#define BLOCK(M) forward_block(M, k, v, work, out, lse + piece * N, qkv, base, step, out_base, out_step, first, left < M * LANES ? left : M * LANES, N, d, factor, bf16)
                if (vectors >= 3 && MOST >= 3) { BLOCK(3); first += 3 * LANES; }
                else if (vectors >= 2) { BLOCK(2); first += 2 * LANES; }
                else { BLOCK(1); first += LANES; }
#undef BLOCK
            }
        }
        free(memory);
    }
    return failed;
}

/* One head, backwards, a block of queries: its rows of dq, and its part of dk and dv (pitch floats apart). */
INLINE void backward_block(int M, const float *k, const float *v, float *dk, float *dv, float *work, void *dqkv, const float *lse,
                           const void *qkv, const void *out, const void *dout, size_t base, size_t step, size_t out_base,
                           size_t out_step, int first, int rows, int N, int d, int pitch, float scale, int bf16) {
    const int lanes = M * LANES, P = pitch / LANES;
    float *q = work, *g = q + (size_t)lanes * pitch, *qt = g + (size_t)lanes * pitch, *gt = qt + (size_t)lanes * d,
          *dqt = gt + (size_t)lanes * d, *p = dqt + (size_t)lanes * d, *ds = p + (size_t)N * lanes;
    float delta[MOST * LANES] = {0}, top[MOST * LANES] = {0}, row[256];
    memset(q, 0, sizeof(float) * 2 * lanes * pitch);
    load_rows(q, pitch, qkv, base, step, first, rows, d, scale * 1.44269504088896340736f, bf16);
    load_rows(g, pitch, dout, out_base, out_step, first, rows, d, 1.0f, bf16);
    for (int i = 0; i < rows; i++) {
        load_row(row, out, out_base + (size_t)(first + i) * out_step, d, bf16);
        for (int c = 0; c < d; c++) delta[i] += row[c] * g[(size_t)i * pitch + c];
        top[i] = lse[first + i];
    }
    across(qt, lanes, q, pitch, rows, d);
    across(gt, lanes, g, pitch, rows, d);
    vec *pv = (vec *)p, *dsv = (vec *)ds, less[MOST], base2[MOST];
    memcpy(less, delta, 4 * lanes);
    memcpy(base2, top, 4 * lanes);
    scores(M, pv, k, d, (const vec *)qt, N, d);
    scores(M, dsv, v, d, (const vec *)gt, N, d);
    for (int j = 0; j < N; j++)
        for (int m = 0; m < M; m++) {
            size_t at = (size_t)j * M + m;
            vec x = exp2v(pv[at] - base2[m]);
            pv[at] = x;
            dsv[at] = x * (dsv[at] - less[m]);
        }
    mix(M, (vec *)dqt, dsv, k, d, N, d);
    for (int i = 0; i < rows; i++) {
        for (int c = 0; c < d; c++) row[c] = dqt[c * lanes + i] * scale;
        store_row(dqkv, base + (size_t)(first + i) * step, row, d, bf16);
    }
    spread(P, (vec *)dv, p, lanes, (const vec *)g, rows, N);
    spread(P, (vec *)dk, ds, lanes, (const vec *)q, rows, N); /* q carries scale log2 e; dk is divided by log2 e at the end */
}

/* Gradient dqkv (B, N, 3, H, d) from that of out. Returns 0, or 1 where memory ran out. */
int eit_attention_backward(const void *qkv, const void *out, const float *lse, const void *dout, void *dqkv, int64_t B, int64_t N,
                           int64_t H, int64_t d, float scale, int bf16, int threads) {
    const size_t step = (size_t)3 * H * d, out_step = (size_t)H * d;
    const int pitch = (int)((d + LANES - 1) / LANES * LANES);
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        const size_t lanes = 2 * LANES, rows = whole((size_t)N * d), wide = (size_t)N * pitch;
        float *memory = aligned_alloc(64, sizeof(float) * whole(2 * rows + 2 * wide + lanes * (2 * pitch + 3 * d + 2 * N) + 64));
        if (memory == NULL) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t piece = 0; piece < B * H; piece++) {
            if (memory == NULL) continue;
            const int64_t b = piece / H, h = piece % H;
            float *k = memory, *v = k + rows, *dk = v + rows, *dv = dk + wide, *work = dv + wide, row[256];
            const size_t base = ((size_t)b * N * 3 * H + h) * d, out_base = ((size_t)b * N * H + h) * d;
            load_rows(k, d, qkv, base + (size_t)H * d, step, 0, N, d, 1.0f, bf16);
            load_rows(v, d, qkv, base + (size_t)2 * H * d, step, 0, N, d, 1.0f, bf16);
            memset(dk, 0, sizeof(float) * 2 * wide);
            for (int first = 0; first < N;) {
                int left = N - first;
#define BLOCK(M) backward_block(M, k, v, dk, dv, work, dqkv, lse + piece * N, qkv, out, dout, base, step, out_base, out_step, first, left < M * LANES ? left : M * LANES, N, d, pitch, scale, bf16)
                if (left > LANES) { BLOCK(2); first += 2 * LANES; }
                else { BLOCK(1); first += LANES; }
#undef BLOCK
            }
            for (int64_t j = 0; j < N; j++) {
                for (int c = 0; c < d; c++) row[c] = dk[j * pitch + c] * 0.693147180559945309417f;
                store_row(dqkv, base + (size_t)H * d + j * step, row, d, bf16);
                store_row(dqkv, base + (size_t)2 * H * d + j * step, dv + j * pitch, d, bf16);
            }
        }
        free(memory);
    }
    return failed;
}
