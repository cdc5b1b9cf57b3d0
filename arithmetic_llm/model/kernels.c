/* What a transformer layer computes between its matrix products, one pass over memory for each;
   and attention to a cache, products and all.

   PyTorch has an operation for each step of a formula, and each reads and writes all of its numbers;
   on a CPU, half of a small model's training step goes there. Here a row is read once, computed in
   fp32 in the cache, and written once. kernels.py has it compiled for the processor at hand, once
   for each type of number, and fused.py says what each function is for.

   Every row is computed by itself and in one order, so a row's result does not depend on others.
   Gradients with respect to weights add up over rows, in the order of the rows. */

#include <math.h>
#include <stdint.h>
#include <string.h>

typedef int64_t size;

#ifdef BF16

typedef uint16_t real; /* the upper half of an fp32 number */

static inline float load(real x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline real store(float x) { /* to nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return x == x ? (real)((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : 0x7fc0; /* else NaN */
}

#else

typedef float real;
static inline float load(real x) { return x; }
static inline real store(float x) { return x; }

#endif

/* e^x to 3e-7 of itself, without a call, so that loops of it become vector instructions. As 2^n e^r
   with n whole and |r| <= ln(2) / 2, where a polynomial is exact enough and n goes into the exponent.
   Of -inf it is 2e-38, which no sum of such numbers feels. */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f; /* n * ln(2) in two parts, the first exact */
    float p = 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    int32_t whole = x == x ? (int32_t)n : 0, bits = (whole + 127) << 23; /* of a NaN p is one */
    float power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

/* Loops over a multiple of as many numbers leave no rest that is computed one by one. */
enum { LANES = 16 };
static inline size padded(size n) { return (n + LANES - 1) / LANES * LANES; }

/* e^(scale x - m) of a row, m so that the largest is 1; returns their sum, and m by `largest`.
   There has to be room for padded(n) of them. */
static float exponentials(const real *x, float *y, size n, float scale, float *largest) {
    float most = -INFINITY, sum = 0;
#pragma omp simd
    for (size i = 0; i < n; i++) y[i] = load(x[i]) * scale;
    for (size i = n; i < padded(n); i++) y[i] = -INFINITY;
#pragma omp simd reduction(max : most)
    for (size i = 0; i < padded(n); i++) most = y[i] > most ? y[i] : most;
#pragma omp simd reduction(+ : sum)
    for (size i = 0; i < padded(n); i++) sum += y[i] = exponential(y[i] - most);
    *largest = most;
    return sum;
}

/* 1 / root mean square of a row. */
static inline float inverse_rms(const real *x, size features, float eps) {
    float squares = 0;
#pragma omp simd simdlen(16) reduction(+ : squares)
    for (size i = 0; i < features; i++) squares += load(x[i]) * load(x[i]);
    return 1.0f / sqrtf(squares / features + eps);
}

/* ------------------------------------------------------------------------------------- norms */

void rms_norm(const real *x, const float *weight, real *y, float *inverse, size rows, size features,
              float eps) {
    for (size row = 0; row < rows; row++, x += features, y += features) {
        float scale = inverse[row] = inverse_rms(x, features, eps);
#pragma omp simd
        for (size i = 0; i < features; i++) y[i] = store(load(x[i]) * scale * weight[i]);
    }
}

/* One row of it. */
static inline void norm_backward(const float *grad, const real *x, const float *weight, float scale,
                                 real *grad_x, float *grad_weight, size features) {
    float along = 0;
#pragma omp simd simdlen(16) reduction(+ : along)
    for (size i = 0; i < features; i++) along += grad[i] * weight[i] * load(x[i]);
    along *= scale * scale / features;
#pragma omp simd simdlen(16)
    for (size i = 0; i < features; i++) {
        grad_x[i] = store(scale * (grad[i] * weight[i] - load(x[i]) * along));
        grad_weight[i] += grad[i] * load(x[i]) * scale;
    }
}

void rms_norm_backward(const real *grad, const real *x, const float *weight, const float *inverse,
                       real *grad_x, float *grad_weight, size rows, size features) {
    float exact[features];
    for (size row = 0; row < rows; row++, grad += features, x += features, grad_x += features) {
#pragma omp simd
        for (size i = 0; i < features; i++) exact[i] = load(grad[i]);
        norm_backward(exact, x, weight, inverse[row], grad_x, grad_weight, features);
    }
}

/* ------------------------------------------------------------------------------------- heads */

/* Queries or keys: norm, rotation and transposition from (B, T, H, D) to (B, H, T, D). The angles
   are (B, T, D), or (T, D) if `turns` is 0: then all rows have the same. */
void heads(const real *x, const float *weight, const real *cos, const real *sin, real *y,
           float *inverse, size rows, size length, size heads, size features, size turns,
           float eps) {
    size half = features / 2, next = length * features; /* head */
    for (size row = 0; row < rows; row++, y += heads * next)
        for (size t = 0; t < length; t++) {
            const real *c = cos + (turns * row * length + t) * features;
            const real *s = sin + (turns * row * length + t) * features;
            real *out = y + t * features;
            for (size head = 0; head < heads; head++, x += features, out += next) {
                float scale = *inverse++ = inverse_rms(x, features, eps);
#pragma omp simd simdlen(16)
                for (size i = 0; i < half; i++) {
                    float first = load(x[i]) * scale * weight[i];
                    float second = load(x[i + half]) * scale * weight[i + half];
                    out[i] = store(first * load(c[i]) + second * load(s[i]));
                    out[i + half] = store(second * load(c[i + half]) + first * load(s[i + half]));
                }
            }
        }
}

void heads_backward(const real *grad, const real *x, const float *weight, const real *cos,
                    const real *sin, const float *inverse, real *grad_x, float *grad_weight,
                    size rows, size length, size heads, size features, size turns) {
    size half = features / 2, next = length * features;
    float turned[features]; /* the gradient before the rotation */
    for (size row = 0; row < rows; row++, grad += heads * next)
        for (size t = 0; t < length; t++) {
            const real *c = cos + (turns * row * length + t) * features;
            const real *s = sin + (turns * row * length + t) * features;
            const real *g = grad + t * features;
            for (size head = 0; head < heads; head++, g += next) {
#pragma omp simd simdlen(16)
                for (size i = 0; i < half; i++) {
                    float first = load(g[i]), second = load(g[i + half]);
                    turned[i] = first * load(c[i]) + second * load(s[i + half]);
                    turned[i + half] = second * load(c[i + half]) + first * load(s[i]);
                }
                norm_backward(turned, x, weight, *inverse++, grad_x, grad_weight, features);
                x += features, grad_x += features;
            }
        }
}

/* --------------------------------------------------------------------------------- attention */

/* Scores (N, queries, keys) become attention weights, in place. Query i looks at the keys up to
   number i + ahead, `window` of them at most; what it does not see weighs 0. */
void causal_softmax(real *scores, size n, size queries, size keys, size ahead, size window,
                    float scale) {
    float exponents[padded(keys)], most;
    for (size at = 0; at < n * queries; at++, scores += keys) {
        size end = at % queries + ahead + 1, start = end > window ? end - window : 0;
        float sum = exponentials(scores + start, exponents, end - start, scale, &most);
        for (size i = 0; i < start; i++) scores[i] = 0;
#pragma omp simd
        for (size i = start; i < end; i++) scores[i] = store(exponents[i - start] * (1.0f / sum));
        for (size i = end; i < keys; i++) scores[i] = 0;
    }
}

/* Gradients of rows of weights become those of their scores, in place. */
void softmax_backward(real *grad, const real *weights, size rows, size keys, float scale) {
    for (size row = 0; row < rows; row++, grad += keys, weights += keys) {
        float along = 0;
#pragma omp simd reduction(+ : along)
        for (size i = 0; i < keys; i++) along += load(grad[i]) * load(weights[i]);
#pragma omp simd
        for (size i = 0; i < keys; i++)
            grad[i] = store(load(weights[i]) * (load(grad[i]) - along) * scale);
    }
}

/* ------------------------------------------------------------------- attention with a cache */

/* One number for each of sixteen queries: they go through the same keys side by side, and no sum
   runs across them. Numbers are fp32, here and in what follows. */
typedef float lanes __attribute__((vector_size(4 * LANES)));

enum { TILE = 64, AT_ONCE = 8 }; /* keys for one softmax; sums that are kept in registers */
#define HIDDEN -1e30f /* a score; not -inf, or a difference of two would be no number */

static inline lanes exponentials_of(lanes x) { /* 0 for what is hidden beside what is not */
    lanes y;
#pragma omp simd
    for (int i = 0; i < LANES; i++) y[i] = x[i] < HIDDEN / 2 ? 0 : exponential(x[i]);
    return y;
}

/* Scores (n, LANES) of n keys (n, features) for queries (features, LANES). */
static void score(const float *keys, const lanes *queries, lanes *scores, size n, size features) {
    for (size j = 0; j < n; j += AT_ONCE) {
        const float *key[AT_ONCE];
        lanes sum[AT_ONCE];
        memset(sum, 0, sizeof sum);
        for (int i = 0; i < AT_ONCE; i++) key[i] = keys + (j + i < n ? j + i : n - 1) * features;
        for (size d = 0; d < features; d++)
#pragma GCC unroll 8
            for (int i = 0; i < AT_ONCE; i++) sum[i] += key[i][d] * queries[d];
        for (int i = 0; i < AT_ONCE; i++) scores[j + i] = sum[i]; /* there is room for TILE */
    }
}

/* Hide what a query at its own position does not see; returns the largest score of each. */
static lanes look(lanes *scores, const int64_t *held, const int32_t *own, int32_t window, size n,
                  lanes largest) {
    for (size j = 0; j < n; j++) {
        lanes row = scores[j];
        int32_t place = held[j];
#pragma omp simd
        for (int i = 0; i < LANES; i++) {
            int seen = place >= 0 && place <= own[i] && own[i] - place < window;
            row[i] = seen ? row[i] : HIDDEN;
            largest[i] = row[i] > largest[i] ? row[i] : largest[i];
        }
        scores[j] = row;
    }
    return largest;
}

/* out (features, LANES) += the values (n, features), each times its weights (n, LANES). */
static void mix(const float *values, const lanes *weights, lanes *out, size n, size features) {
    for (size d = 0; d < features; d += AT_ONCE) {
        lanes sum[AT_ONCE];
        memcpy(sum, out + d, sizeof sum);
        for (size j = 0; j < n; j++)
#pragma GCC unroll 8
            for (int i = 0; i < AT_ONCE; i++) sum[i] += values[j * features + d + i] * weights[j];
        memcpy(out + d, sum, sizeof sum);
    }
}

static int any_in(const int64_t *held, size n, int64_t oldest, int64_t newest) {
    int found = 0;
    for (size j = 0; j < n; j++) found |= held[j] >= oldest && held[j] <= newest;
    return found;
}

/* Sums (features, LANES) of the values that queries see, by e^score; returns those of the weights.
   The softmax is made a tile of keys at a time: sums made with a smaller maximum fade when a larger
   one is met (Milakov & Gimelshein, 2018). */
static lanes attend(const lanes *query, const float *keys, const float *values,
                    const int64_t *held, const int32_t *own, lanes *sum, size slots, size features,
                    size window) {
    lanes weights[TILE], most = (lanes){0} + HIDDEN, total = {0};
    int64_t oldest = own[0] < window ? 0 : own[0] - window + 1;
    memset(sum, 0, sizeof(lanes) * features);
    for (size at = 0; at < slots; at += TILE, keys += TILE * features, values += TILE * features) {
        size n = slots - at < TILE ? slots - at : TILE;
        if (!any_in(held + at, n, oldest, own[LANES - 1])) continue;
        score(keys, query, weights, n, features);
        lanes largest = look(weights, held + at, own, window, n, most);
        lanes fade = exponentials_of(most - largest);
        most = largest, total *= fade;
        for (size d = 0; d < features; d++) sum[d] *= fade;
        for (size j = 0; j < n; j++) total += weights[j] = exponentials_of(weights[j] - most);
        mix(values, weights, sum, n, features);
    }
    return total;
}

/* out (B, H, T, D) = softmax(scale q k^T) v of queries (B, H, T, D), whose rows and heads begin so
   many numbers apart in keys and values, (slots, D) for each. A query at a position sees the slots
   that hold positions (B, slots) up to its own, `window` of them at most, and none below 0; it sees
   one at least. D is a multiple of 8. */
void cached_attention(const float *q, const float *keys, const float *values, const int64_t *held,
                      const int64_t *positions, float *out, size rows, size heads, size queries,
                      size features, size slots, size next_row, size next_head, size window,
                      float scale) {
    lanes query[features], sum[features];
    int32_t own[LANES];
    for (size at = 0; at < rows * heads; at++, q += queries * features, out += queries * features)
        for (size first = 0; first < queries; first += LANES) {
            size row = at / heads, begins = row * next_row + at % heads * next_head;
            size count = queries - first < LANES ? queries - first : LANES;
            for (size i = 0; i < LANES; i++) { /* where there are fewer, the last one again */
                size t = first + (i < count ? i : count - 1);
                own[i] = positions[row * queries + t];
                for (size d = 0; d < features; d++) query[d][i] = q[t * features + d] * scale;
            }
            lanes total = attend(query, keys + begins, values + begins, held + row * slots, own,
                                 sum, slots, features, window);
            for (size d = 0; d < features; d++) {
                lanes mean = sum[d] / total;
                for (size i = 0; i < count; i++) out[(first + i) * features + d] = mean[i];
            }
        }
}

/* ------------------------------------------------------------------------------ feed-forward */

void swiglu(const real *gate, const real *up, real *y, size n) {
#pragma omp simd
    for (size i = 0; i < n; i++)
        y[i] = store(load(gate[i]) * sigmoid(load(gate[i])) * load(up[i]));
}

void swiglu_backward(const real *grad, const real *gate, const real *up, real *grad_gate,
                     real *grad_up, size n) {
#pragma omp simd
    for (size i = 0; i < n; i++) {
        float g = load(gate[i]), s = sigmoid(g);
        grad_gate[i] = store(load(grad[i]) * load(up[i]) * s * (1.0f + g * (1.0f - s)));
        grad_up[i] = store(load(grad[i]) * g * s);
    }
}

/* -------------------------------------------------------------------------------------- loss */

/* Sum over rows of weight x -log softmax(logits)[target], and its gradient. Of a target that is no
   class the loss is NaN. */
void cross_entropy(const real *logits, const int64_t *targets, const float *weights, real *grad,
                   double *loss, size rows, size classes) {
    float p[padded(classes)], most;
    for (size row = 0; row < rows; row++, logits += classes, grad += classes) {
        float sum = exponentials(logits, p, classes, 1.0f, &most), share = weights[row] / sum;
        size target = targets[row];
        if (target < 0 || target >= classes) {
            *loss = NAN;
            target = 0;
        }
        *loss += weights[row] * (logf(sum) + (most - load(logits[target])));
        p[target] -= sum;
#pragma omp simd
        for (size i = 0; i < classes; i++) grad[i] = store(p[i] * share);
    }
}
