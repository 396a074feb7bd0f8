// The arithmetic on tiles, from one source for every instruction set: CMake compiles this file once per set, with
// XSEP_ISA naming the namespace and flags choosing the vectors.  See kernels.h for what each function computes.
//
// Cost model, in cycles per vector of 3x3 outputs where a multiply-add takes one: 9 multiply-adds; 4.5 loads from the
// first-level cache (36 pixels and 36 weights for 16 outputs) beside them; 2.5 lines from the second level.  Staging an
// NCHW tile adds a load, four shuffles and a store, and storing it as much.  Tensors beyond the last-level cache are
// bound by memory: rows are prefetched, and lines that are written whole go past the caches.

#if defined(__x86_64__)
#include <immintrin.h>  // only always_inline functions, so nothing leaks into other objects
#endif

#include "kernels.h"

namespace xsep::cpu::XSEP_ISA {

#include "vec-inl.h"

struct half_t {
  u16 bits;
  static constexpr bool kIsBfloat16 = false;
};
struct bfloat16_t {
  u16 bits;
  static constexpr bool kIsBfloat16 = true;
};

template <int kValue>
struct constant {
  static constexpr int value = kValue;
};

// f(constant<L>, i) over [0, n): whole vectors, then halves, quarters, ... of one; every element once.
template <int L, class F>
inline void for_lanes(int n, F&& f, int i = 0) {
  for (; i + L <= n; i += L) f(constant<L>{}, i);
  if constexpr (L > 1) {
    if (i < n) for_lanes<L / 2>(n, f, i);
  }
}

template <int L, class A>
inline vec<A, L> relu(vec<A, L> v) {
  return v <= A{0} ? vec<A, L>{} : v;  // NaN stays
}

template <int L, class A>
inline vec<A, L> apply(const Affine<A>& f, vec<A, L> x, vec<A, L> center, vec<A, L> scale, vec<A, L> shift) {
  const vec<A, L> u = scale * (x - center) + shift;
  return f.relu ? relu<L, A>(u) : u;
}

// du, with zeros where the ReLU gave zero.
template <int L, class A>
inline vec<A, L> masked(const Affine<A>& f, vec<A, L> du, vec<A, L> x, vec<A, L> center, vec<A, L> scale,
                        vec<A, L> shift) {
  if (!f.relu) return du;
  const vec<A, L> u = scale * (x - center) + shift;
  return u <= A{0} ? vec<A, L>{} : du;
}

template <class A>
inline void zero(A* p, ptrdiff_t count) {
  __builtin_memset(p, 0, count * sizeof(A));
}

inline bool inside(int i, int extent) { return static_cast<unsigned>(i) < static_cast<unsigned>(extent); }

// A value used by several multiply-adds stays in its register: left alone, GCC loads it anew for each of them.  (An
// element of an array as the operand itself would be stored there, though nothing reads it.)
template <class V>
inline V in_register(V v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__x86_64__)
  if constexpr (sizeof(V) <= kVectorBytes) asm("" : "+x"(v));
#endif
  return v;
}

#include "stage-inl.h"
#include "conv-inl.h"
#include "wgrad-inl.h"
#include "gemm-inl.h"
#include "residual-inl.h"

template <class T>
constexpr Kernels<acc_t<T>> kernels_of() {
  typedef acc_t<T> A;
  return {stage_nhwc<T>,
          stage_nchw<T>,
          conv<T>,
          conv<A>,
          wgrad<T>,
          wgrad<A>,
          store_nhwc<T>,
          store_nchw<T>,
          gemm<A>,
          finish<T>,
          add<A>,
          clamp<A>,
          relu_with_gradient<A>,
          residual_row<T>,
          residual_row_grad<T>,
          unpool_row<T>};
}

#define XSEP_STRING_(x) #x
#define XSEP_STRING(x) XSEP_STRING_(x)
extern const Isa isa = {XSEP_STRING(XSEP_ISA), kernels_of<float>(), kernels_of<half_t>(), kernels_of<bfloat16_t>(),
                        kernels_of<double>()};

}  // namespace xsep::cpu::XSEP_ISA
