// Vectors of L elements of the accumulation type, loaded from and stored to the element types.
//
// Compiled once per instruction set inside namespace XSEP_ISA; includes nothing that defines functions of external
// linkage.  GNU vector types carry the arithmetic; only the half-precision conversions have instructions of their own.

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;  // what every x86-64 (SSE2) and AArch64 (NEON) has
#endif

template <class A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

typedef unsigned short u16;
typedef unsigned int u32;
typedef int i32;

// vec<A, L>: L elements of A.  unaligned<A, L>: the same in memory, at any address and beside any other type.
template <class A, int L>
struct vec_of {
  typedef A type __attribute__((vector_size(sizeof(A) * L)));
  typedef A unaligned __attribute__((vector_size(sizeof(A) * L), aligned(1), may_alias));
};
template <class A, int L>
using vec = typename vec_of<A, L>::type;
template <class A, int L>
using unaligned = typename vec_of<A, L>::unaligned;

template <class T>
struct accumulate {
  typedef float type;
};
template <>
struct accumulate<double> {
  typedef double type;
};
template <class T>
using acc_t = typename accumulate<T>::type;

template <int L>
inline vec<float, L> half_to_float(vec<u16, L> h) {
#if defined(__AVX512F__)
  if constexpr (L == 16) return (vec<float, L>)_mm512_cvtph_ps((__m256i)h);
#endif
#if defined(__F16C__)
  if constexpr (L == 8) return (vec<float, L>)_mm256_cvtph_ps((__m128i)h);
#endif
  // Exponent and mantissa moved into place, then the exponent rebased; subnormals through a float subtraction.
  const vec<u32, L> bits = __builtin_convertvector(h, vec<u32, L>);
  const vec<u32, L> sign = (bits & 0x8000u) << 16, rest = (bits & 0x7fffu) << 13;
  const vec<u32, L> normal = rest + (112u << 23), special = rest | 0x7f800000u;
  const vec<u32, L> magic = rest + (113u << 23);
  const vec<u32, L> smallest = magic * 0u + (113u << 23);
  const vec<u32, L> subnormal = (vec<u32, L>)((vec<float, L>)magic - (vec<float, L>)smallest);
  const vec<i32, L> is_special = (vec<i32, L>)rest >= 0x0f800000, is_subnormal = (vec<i32, L>)rest < 0x00800000;
  const vec<u32, L> magnitude = (vec<u32, L>)(is_special     ? (vec<i32, L>)special
                                              : is_subnormal ? (vec<i32, L>)subnormal
                                                             : (vec<i32, L>)normal);
  return (vec<float, L>)(magnitude | sign);
}

template <int L>
inline vec<u16, L> float_to_half(vec<float, L> f) {
#if defined(__AVX512F__)
  if constexpr (L == 16) return (vec<u16, L>)_mm512_cvtps_ph((__m512)f, _MM_FROUND_TO_NEAREST_INT);
#endif
#if defined(__F16C__)
  if constexpr (L == 8) return (vec<u16, L>)_mm256_cvtps_ph((__m256)f, _MM_FROUND_TO_NEAREST_INT);
#endif
  typedef vec<i32, L> vi;
  const vec<u32, L> bits = (vec<u32, L>)f, magnitude = bits & 0x7fffffffu;
  const vec<u32, L> half = magnitude * 0u + 0x3f000000u;
  // Below 2^-14, adding 0.5 lines the subnormal up with float's last bits and rounds it.
  const vi small = (vi)((vec<u32, L>)((vec<float, L>)magnitude + (vec<float, L>)half) - 0x3f000000u);
  const vi normal = (vi)((magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13);
  const vi nan = (vi)(0x7e00u | ((magnitude >> 13) & 0x3ffu)), infinity = (vi)(magnitude * 0u + 0x7c00u);
  const vi value = (vi)magnitude;
  const vi result = value > 0x7f800000 ? nan : value >= 0x477ff000 ? infinity : value < 0x38800000 ? small : normal;
  return __builtin_convertvector((vec<u32, L>)result | ((bits >> 16) & 0x8000u), vec<u16, L>);
}

template <int L>
inline vec<u16, L> float_to_bfloat16(vec<float, L> f) {
#if defined(__AVX512BF16__)  // subnormal results become zero
  if constexpr (L == 16) return (vec<u16, L>)_mm512_cvtneps_pbh((__m512)f);
#endif
  typedef vec<i32, L> vi;
  const vec<u32, L> bits = (vec<u32, L>)f;
  const vi rounded = (vi)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16), nan = (vi)((bits >> 16) | 0x40u);
  const vi is_nan = (vi)(bits & 0x7fffffffu) > 0x7f800000;
  return __builtin_convertvector((vec<u32, L>)(is_nan ? nan : rounded), vec<u16, L>);
}

template <int L, class T>
inline vec<acc_t<T>, L> load(const T* p) {
  if constexpr (sizeof(T) >= 4) {
    return *reinterpret_cast<const unaligned<T, L>*>(p);
  } else {
    const vec<u16, L> bits = *reinterpret_cast<const unaligned<u16, L>*>(p);
    if constexpr (T::kIsBfloat16)
      return (vec<float, L>)(__builtin_convertvector(bits, vec<u32, L>) << 16);
    else
      return half_to_float<L>(bits);
  }
}

template <int L, class T>
inline void store(T* p, vec<acc_t<T>, L> value) {
  if constexpr (sizeof(T) >= 4) {
    *reinterpret_cast<unaligned<T, L>*>(p) = value;
  } else if constexpr (T::kIsBfloat16) {
    *reinterpret_cast<unaligned<u16, L>*>(p) = float_to_bfloat16<L>(value);
  } else {
    *reinterpret_cast<unaligned<u16, L>*>(p) = float_to_half<L>(value);
  }
}

template <int L, class A>
inline vec<A, L> broadcast(A value) {
  return value - vec<A, L>{};  // not {} + value, which would turn -0 into 0
}

template <int L, class A>
inline A sum(vec<A, L> v) {
  if constexpr (L == 1)
    return v[0];
  else {
    vec<A, L / 2> low, high;
    __builtin_memcpy(&low, &v, sizeof low);
    __builtin_memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
    return sum<L / 2, A>(low + high);
  }
}

// A cache line past the caches, for outputs that would not stay in them: a line that is written whole need not be read
// first, if all of it is written at once.  `dst` is aligned to it.  Such stores are ordered by finish_streaming alone.
inline void stream_line(void* dst, const void* src) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(dst), _mm512_loadu_si512(src));
#elif defined(__AVX2__)
  const __m256i* from = static_cast<const __m256i*>(src);
  const __m256i low = _mm256_loadu_si256(from), high = _mm256_loadu_si256(from + 1);
  _mm256_stream_si256(static_cast<__m256i*>(dst), low);
  _mm256_stream_si256(static_cast<__m256i*>(dst) + 1, high);
#else
  __builtin_memcpy(dst, src, 64);
#endif
}
inline void finish_streaming() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}
