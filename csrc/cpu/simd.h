// One SIMD vector of fp32 in the compiler's own vector type, and the functions that losses need.
// Included once per instruction set, inside its namespace; LANES follows from SPF_VECTOR_BYTES.

constexpr int LANES = SPF_VECTOR_BYTES / sizeof(float);
typedef float vf __attribute__((vector_size(SPF_VECTOR_BYTES)));
typedef int32_t vi __attribute__((vector_size(SPF_VECTOR_BYTES)));  // and a comparison's result
typedef uint32_t vu __attribute__((vector_size(SPF_VECTOR_BYTES)));

#define SPF_INLINE static inline __attribute__((always_inline))

constexpr float INF = __builtin_inff();

SPF_INLINE vf load(const float* p) {
  vf x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
SPF_INLINE void store(float* p, vf x) { __builtin_memcpy(p, &x, sizeof x); }
SPF_INLINE vf broadcast(float x) { return x - vf{}; }
SPF_INLINE vf bits_to_float(vi x) { return (vf)x; }

// a * b + c. Only this is ever fused (the build says -ffp-contract=off), so that a row's result
// does not depend on which of the templates' instances it went through. Asked by width: a target
// pragma, by which the engines are compiled, does not define __FMA__.
SPF_INLINE vf fma(vf a, vf b, vf c) {
#if SPF_VECTOR_BYTES == 64 && !SPF_EMULATED
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif SPF_VECTOR_BYTES == 32
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
SPF_INLINE vf fma(vf a, vf b, float c) { return fma(a, b, broadcast(c)); }
SPF_INLINE vf fma(vf a, float b, vf c) { return fma(a, broadcast(b), c); }
SPF_INLINE vf fma(vf a, float b, float c) { return fma(a, broadcast(b), broadcast(c)); }
SPF_INLINE vf max(vf a, vf b) { return b > a ? b : a; }  // a NaN in `a` stays
SPF_INLINE vf min(vf a, vf b) { return b < a ? b : a; }
SPF_INLINE vf abs(vf x) { return (vf)((vi)x & 0x7fffffff); }

// e^x = 2^n (1 + p) with p = e^r - 1, |r| <= ln(2) / 2. For x in [-87.3, 88].
struct ExpParts {
  vf p, power;
};
SPF_INLINE ExpParts exp_parts(vf x) {
  const vf shift = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  vf n = fma(x, 1.44269504088896341f, shift) - shift;
  vf r = fma(n, 2.12194440e-4f, fma(n, -0.693359375f, x));  // ln 2 in two parts
  vf q = fma(r, 1.0f / 5040, 1.0f / 720);
  q = fma(q, r, 1.0f / 120);
  q = fma(q, r, 1.0f / 24);
  q = fma(q, r, 1.0f / 6);
  q = fma(q, r, 0.5f);
  vi exponent = __builtin_convertvector(n, vi);
  return {fma(q, r * r, r), bits_to_float((exponent + 127) << 23)};
}

// Below -87.3 the result is 0; NaN stays NaN.
SPF_INLINE vf exp(vf x) {
  ExpParts e = exp_parts(x);
  return x < -87.3f ? broadcast(0.0f) : fma(e.p, e.power, e.power);
}

// e^x - 1 for x <= 88, exact near 0.
SPF_INLINE vf expm1(vf x) {
  ExpParts e = exp_parts(x);
  return x < -87.3f ? broadcast(-1.0f) : fma(e.p, e.power, e.power - 1.0f);
}

SPF_INLINE vf tanh(vf x) {
  vf e = expm1(-2.0f * abs(x));  // in (-1, 0]
  vf t = -e / (e + 2.0f);
  return x < 0.0f ? -t : t;
}

// log u for normal u > 0. Of another u, in a lane that a caller does not select, anything.
SPF_INLINE vf log(vf u) {
  // u = 2^n (1 + f) with 1 + f in [sqrt(1/2), sqrt(2))
  vi bits = (vi)((vu)u - 0x3f3504f3u);  // unsigned: it may wrap where u < 0
  vf n = __builtin_convertvector(bits >> 23, vf);
  vf f = bits_to_float((bits & 0x007fffff) + 0x3f3504f3) - 1.0f;
  vf s = f / (f + 2.0f), s2 = s * s;  // log(1 + f) = 2 atanh(s)
  vf series = fma(s2, 1.0f / 9, 1.0f / 7);
  series = fma(series, s2, 1.0f / 5);
  series = fma(series, s2, 1.0f / 3);
  return fma(n, 0.693147180559945f, 2.0f * fma(s * s2, series, s));
}

// log(1 + x) for finite x > -1. The rounding error of 1 + x is put back as a first-order term.
SPF_INLINE vf log1p(vf x) {
  vf u = 1.0f + x;
  return log(u) + (x - (u - 1.0f)) / u;
}

// e^d - 1 - d by its Taylor series, for |d| <= 1/2.
SPF_INLINE vf excess(vf d) {
  vf s = fma(d, 1.0f / 3628800, 1.0f / 362880);
  s = fma(s, d, 1.0f / 40320);
  s = fma(s, d, 1.0f / 5040);
  s = fma(s, d, 1.0f / 720);
  s = fma(s, d, 1.0f / 120);
  s = fma(s, d, 1.0f / 24);
  s = fma(s, d, 1.0f / 6);
  s = fma(s, d, 0.5f);
  return s * d * d;
}
