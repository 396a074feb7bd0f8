// The arithmetic on tiles, from one source for every instruction set: CMake compiles this file once per set, with
// XSEP_ISA naming the namespace and flags choosing the vectors.  See kernels.h for what each function computes.
//
// Cost model (cycles per vector of outputs, 3x3): NHWC 9 FMA, about 5 loads from L1 and one store, since a register tile
// of 8 outputs uses each staged pixel for 3 of them; NCHW 9 FMA with a (mostly line-crossing) load each.  Staging adds a
// load and a store per vector of input.  Tensors beyond the last-level cache are bound by DRAM, not by this.

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

// The same with the last vector moved back to end at n, so that some elements come twice: for idempotent copies.
template <int L, class F>
inline void for_lanes_overlapping(int n, F&& f) {
  if constexpr (L > 1) {
    if (n < L) return for_lanes_overlapping<L / 2>(n, f);
  }
  int i = 0;
  for (; i + L <= n; i += L) f(constant<L>{}, i);
  if (i < n) f(constant<L>{}, n - L);
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

// Turns du into dx for one vector and returns du masked by the ReLU.
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

// NHWC ---------------------------------------------------------------------------------------------------------------

template <class T>
void stage_nhwc(const StageNhwc<acc_t<T>>& s) {
  typedef acc_t<T> A;
  constexpr int L = kLanes<A>;
  for (int i = 0; i < s.rows; ++i) {
    A* dst = s.tile + ptrdiff_t{i} * s.cols * s.block;
    if (i < s.row_lo || i >= s.row_hi || s.col_lo >= s.col_hi) {
      zero(dst, ptrdiff_t{s.cols} * s.block);
      continue;
    }
    zero(dst, ptrdiff_t{s.col_lo} * s.block);
    zero(dst + ptrdiff_t{s.col_hi} * s.block, ptrdiff_t{s.cols - s.col_hi} * s.block);
    dst += ptrdiff_t{s.col_lo} * s.block;
    const T* src = static_cast<const T*>(s.src) + (i - s.row_lo) * s.row;
    if (s.lanes == s.block && s.lane == 1 && !s.affine.any) {
      for (int j = s.col_lo; j < s.col_hi; ++j, src += s.pixel, dst += s.block) {
        for (int c = 0; c < s.block; c += L) store<L>(dst + c, load<L>(src + c));
      }
      continue;
    }
    for (int j = s.col_lo; j < s.col_hi; ++j, src += s.pixel, dst += s.block) {
      if (s.lane != 1) {
        for (int c = 0; c < s.lanes; ++c) store<1>(dst + c, load<1>(src + c * s.lane));
      } else {
        for_lanes<L>(s.lanes, [&](auto l, int c) { store<l.value>(dst + c, load<l.value>(src + c)); });
      }
      if (s.affine.any) {
        for_lanes<L>(s.lanes, [&](auto l, int c) {
          constexpr int n = l.value;
          store<n>(dst + c, apply<n, A>(s.affine, load<n>(dst + c), load<n>(s.affine.center + c),
                                        load<n>(s.affine.scale + c), load<n>(s.affine.shift + c)));
        });
      }
      zero(dst + s.lanes, s.block - s.lanes);
    }
  }
}

// A row of du becomes dx, and is summed in registers before it joins the sums of the rows above: short sums are exact.
template <int L, class T>
inline void store_affine_row(const StoreNhwc<acc_t<T>>& s, const acc_t<T>* src, T* dst, const T* x, int c) {
  typedef acc_t<T> A;
  const AffineGrad<A>& g = s.grad;
  const vec<A, L> center = load<L>(g.affine.center + c), scale = load<L>(g.affine.scale + c);
  const vec<A, L> shift = load<L>(g.affine.shift + c);
  vec<A, L> dscale = {}, dshift = {};
  for (int j = 0; j < s.cols; ++j) {
    const vec<A, L> value = load<L>(x + j * g.x_pixel + c);
    const vec<A, L> du = masked<L, A>(g.affine, load<L>(src + j * s.block + c), value, center, scale, shift);
    store<L>(dst + j * s.pixel + c, du * scale);
    dscale += du * (value - center);
    dshift += du;
  }
  if (g.dscale) store<L>(g.dscale + c, load<L>(g.dscale + c) + dscale);
  if (g.dshift) store<L>(g.dshift + c, load<L>(g.dshift + c) + dshift);
}

template <class T>
void store_nhwc(const StoreNhwc<acc_t<T>>& s) {
  typedef acc_t<T> A;
  constexpr int L = kLanes<A>;
  for (int i = 0; i < s.rows; ++i) {
    const A* src = s.tile + ptrdiff_t{i} * s.cols * s.block;
    T* dst = static_cast<T*>(s.dst) + i * s.row;
    if (s.grad.affine.any) {
      const T* x = static_cast<const T*>(s.grad.x) + i * s.grad.x_row;
      for_lanes<L>(s.lanes, [&](auto l, int c) { store_affine_row<l.value, T>(s, src, dst, x, c); });
      continue;
    }
    for (int j = 0; j < s.cols; ++j, src += s.block, dst += s.pixel) {
      if (s.lane != 1) {
        for (int c = 0; c < s.lanes; ++c) store<1>(dst + c * s.lane, load<1>(src + c));
      } else {
        for_lanes<L>(s.lanes, [&](auto l, int c) { store<l.value>(dst + c, load<l.value>(src + c)); });
      }
    }
  }
}

// Pixels beyond the left and right border read these zeros (a cache line or two of any type).
alignas(64) const char kZeros[128] = {};

inline bool inside(int i, int extent) { return static_cast<unsigned>(i) < static_cast<unsigned>(extent); }

// A value used by several multiply-adds stays in its register: left alone, GCC loads it anew for each of them.
template <class V>
inline void keep_in_register(V& v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__x86_64__)
  if constexpr (sizeof(V) <= kVectorBytes) asm("" : "+x"(v));
#endif
}

// The pixels of one row, beginning with the one that tap column 0 of an output meets; kBorder: some may not exist.
template <class T, bool kBorder>
struct RowOfPixels {
  const T* data;
  ptrdiff_t pixel;
  int first, cols;

  const T* operator[](int i) const {
    if constexpr (!kBorder) return data + i * pixel;
    else return inside(first + i, cols) ? data + i * pixel : reinterpret_cast<const T*>(kZeros);
  }
};

// kOut outputs of one vector of channels.  With kCols > 0 the taps of a row are neighbours, and a pixel serves every
// output it belongs to from one load; kStep is the distance of outputs in pixels.  kCols == 0 takes any taps.
template <class T, int kCols, int kStep, bool kBorder, int kOut>
inline void conv_outputs(const ConvNhwc<acc_t<T>>& c, const T* in, int r_lo, int r_hi, int first_col,
                         const acc_t<T>* w, const acc_t<T>* init, T* out) {
  typedef acc_t<T> A;
  constexpr int L = kLanes<A>;
  vec<A, L> acc[kOut];
#pragma GCC unroll 8
  for (int t = 0; t < kOut; ++t) acc[t] = init ? load<L>(init) : load<L>(out + t * c.out_pixel);
  for (int r = r_lo; r < r_hi; ++r) {
    const RowOfPixels<T, kBorder> x{in + r * c.in.tap_row * c.in.row, c.in.pixel, first_col, c.in.cols};
    if constexpr (kCols == 0) {
      for (int s = 0; s < c.tap_cols; ++s) {
        const vec<A, L> weight = load<L>(w + (r * c.tap_cols + s) * c.block);
#pragma GCC unroll 8
        for (int t = 0; t < kOut; ++t) acc[t] += load<L>(x[t * c.in.step_col + s * c.in.tap_col]) * weight;
      }
    } else {
      vec<A, L> weight[kCols];
#pragma GCC unroll 8
      for (int s = 0; s < kCols; ++s) weight[s] = load<L>(w + (r * kCols + s) * c.block);
#pragma GCC unroll 32
      for (int j = 0; j < (kOut - 1) * kStep + kCols; ++j) {
        vec<A, L> pixel = load<L>(x[j]);
        keep_in_register(pixel);
#pragma GCC unroll 8
        for (int t = 0; t < kOut; ++t) {
          const int s = j - t * kStep;
          if (s >= 0 && s < kCols) acc[t] += pixel * weight[s];
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < kOut; ++t) store<L>(out + t * c.out_pixel, acc[t]);
}

// f(constant<outputs>, j) over [0, n) in few calls, 8 outputs if possible.  `overlap`: some may come twice.
template <class F>
inline void for_outputs(int n, bool overlap, F&& f) {
  int j = 0;
  for (; j + 8 <= n; j += 8) f(constant<8>{}, j);
  if (overlap && n - j > 4 && n >= 8) return f(constant<8>{}, n - 8);
  if (n - j >= 4) f(constant<4>{}, j), j += 4;
  if (overlap && n - j == 3 && n >= 4) return f(constant<4>{}, n - 4);
  if (n - j >= 2) f(constant<2>{}, j), j += 2;
  if (n - j >= 1) f(constant<1>{}, j);
}

template <class T, int kCols, int kStep>
void conv_rows(const ConvNhwc<acc_t<T>>& args) {
  typedef acc_t<T> A;
  const ConvNhwc<A> c = args;  // a copy, which no store through a pointer can be thought to change
  const PixelsNhwc& x = c.in;
  for (int i = 0; i < c.rows; ++i) {
    const int row = x.first_row + i * x.step_row;
    // The tap rows that exist: 0 <= row + r * tap_row < rows.
    const int r_lo = row < 0 ? (-row + x.tap_row - 1) / x.tap_row : 0;
    const int r_end = row < x.rows ? (x.rows - 1 - row) / x.tap_row + 1 : 0;
    const int r_hi = r_end < c.tap_rows ? r_end : c.tap_rows;
    const T* in = static_cast<const T*>(x.data) + row * x.row;
    T* out = static_cast<T*>(c.out) + i * c.out_row;
    const auto outputs = [&](auto count, int j) {
      constexpr int n = count.value;
      const int first = x.first_col + j * x.step_col;
      const bool interior = first >= 0 && first + (n - 1) * x.step_col + (c.tap_cols - 1) * x.tap_col < x.cols;
      // Channels innermost: memory is walked in order, which is what hardware prefetchers follow.
      for (int b = 0; b < c.blocks; ++b) {
        for (int v = 0; v < c.block; v += kLanes<A>) {
          const int at = b * c.block + v;
          const T* pixels = in + first * x.pixel + at;
          const A* weights = c.weights + b * c.weights_step + v;
          const A* init = c.init ? c.init + at : nullptr;
          T* dst = out + j * c.out_pixel + at;
          if (interior) conv_outputs<T, kCols, kStep, false, n>(c, pixels, r_lo, r_hi, first, weights, init, dst);
          else conv_outputs<T, kCols, kStep, true, n>(c, pixels, r_lo, r_hi, first, weights, init, dst);
        }
      }
    };
    for_outputs(c.cols, c.init != nullptr, outputs);  // adding to out twice would count twice
  }
}

template <class T>
void conv_nhwc(const ConvNhwc<acc_t<T>>& c) {
  if (c.in.tap_col == 1 && c.in.step_col == 1) {
    switch (c.tap_cols) {
      case 1: return conv_rows<T, 1, 1>(c);
      case 2: return conv_rows<T, 2, 1>(c);
      case 3: return conv_rows<T, 3, 1>(c);
      case 4: return conv_rows<T, 4, 1>(c);
      case 5: return conv_rows<T, 5, 1>(c);
      case 7: return conv_rows<T, 7, 1>(c);
    }
  } else if (c.in.tap_col == 1 && c.in.step_col == 2) {
    switch (c.tap_cols) {
      case 3: return conv_rows<T, 3, 2>(c);
      case 5: return conv_rows<T, 5, 2>(c);
      case 7: return conv_rows<T, 7, 2>(c);
    }
  }
  conv_rows<T, 0, 0>(c);
}

// kRows * kCols accumulators over columns [j, j_end) of row i of dy, kOut at a time, for the taps from `first` on: tap
// rows, or with kStep == 0 any kRows taps in row-major order.
template <class T, int kCols, int kStep, int kRows>
inline void wgrad_taps(const WgradNhwc<acc_t<T>>& g, int first, int i, int j, int j_end, int at, acc_t<T>* dw) {
  typedef acc_t<T> A;
  constexpr bool kAny = kStep == 0;
  constexpr int L = kLanes<A>, kOut = kAny ? 1 : 4;
  const PixelsNhwc& x = g.x;
  const T* dy = static_cast<const T*>(g.dy) + i * g.dy_row + at;
  const T* rows[kRows];
  bool exists[kRows];
  int tap_col[kRows];
#pragma GCC unroll 8
  for (int k = 0; k < kRows; ++k) {
    const int r = kAny ? (first + k) / g.tap_cols : first + k;
    tap_col[k] = kAny ? (first + k) % g.tap_cols * x.tap_col : 0;
    const int row = x.first_row + i * x.step_row + r * x.tap_row;
    exists[k] = inside(row, x.rows);
    rows[k] = static_cast<const T*>(x.data) + row * x.row + at;
  }
  vec<A, L> acc[kRows][kCols] = {};
  const auto columns = [&](auto border, auto count, int j) {
    constexpr int n = count.value;
    vec<A, L> d[n];
#pragma GCC unroll 8
    for (int t = 0; t < n; ++t) {
      d[t] = load<L>(dy + (j + t) * g.dy_pixel);
      keep_in_register(d[t]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      if (!exists[r]) continue;
      const int col = x.first_col + j * x.step_col + tap_col[r];
      const RowOfPixels<T, border.value> pixels{rows[r] + col * x.pixel, x.pixel, col, x.cols};
#pragma GCC unroll 32
      for (int k = 0; k < (n - 1) * kStep + kCols; ++k) {
        vec<A, L> pixel = load<L>(pixels[k]);
        keep_in_register(pixel);
#pragma GCC unroll 8
        for (int t = 0; t < n; ++t) {
          const int s = k - t * kStep;
          if (s >= 0 && s < kCols) acc[r][s] += pixel * d[t];
        }
      }
    }
  };
  const auto any = [&](auto count, int j) {
    const int left = x.first_col + j * x.step_col, taps = kAny ? (g.tap_cols - 1) * x.tap_col : kCols - 1;
    if (left >= 0 && left + (count.value - 1) * x.step_col + taps < x.cols) columns(constant<0>{}, count, j);
    else columns(constant<1>{}, count, j);
  };
  for (; j + kOut <= j_end; j += kOut) any(constant<kOut>{}, j);
  if constexpr (kOut > 1) {
    for (; j < j_end; ++j) any(constant<1>{}, j);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int s = 0; s < kCols; ++s, dw += g.block) store<L>(dw, load<L>(dw) + acc[r][s]);
  }
}

// f(row of dy, its columns [j, j_end), channel, that channel's dw) over the tile: a stretch of columns, then every
// channel of it, so that memory is walked in order; long enough that loading and storing the sums is a small part.
template <class T, class F>
inline void for_wgrad(const WgradNhwc<acc_t<T>>& g, F&& f) {
  constexpr int kStretch = 20;
  const int stretches = (g.cols + kStretch - 1) / kStretch;
  for (int i = 0; i < g.rows; ++i) {
    for (int k = 0; k < stretches; ++k) {
      for (int b = 0; b < g.blocks; ++b) {
        for (int v = 0; v < g.block; v += kLanes<acc_t<T>>) {
          f(i, g.cols * k / stretches, g.cols * (k + 1) / stretches, b * g.block + v, g.dw + b * g.dw_step + v);
        }
      }
    }
  }
}

// As many tap rows at a time as leave registers for 4 columns of dy.
template <class T, int kCols, int kStep>
void wgrad_rows(const WgradNhwc<acc_t<T>>& args) {
  const WgradNhwc<acc_t<T>> g = args;
  constexpr int kRows = kCols == 3 ? 3 : kVectorBytes < 64 ? 1 : kCols == 5 ? 5 : 3;
  for_wgrad<T>(g, [&](int i, int j, int j_end, int at, acc_t<T>* dw) {
    int r = 0;
    for (; r + kRows <= g.tap_rows; r += kRows, dw += kRows * kCols * g.block) {
      wgrad_taps<T, kCols, kStep, kRows>(g, r, i, j, j_end, at, dw);
    }
    for (; r < g.tap_rows; ++r, dw += kCols * g.block) wgrad_taps<T, kCols, kStep, 1>(g, r, i, j, j_end, at, dw);
  });
}

template <class T>
void wgrad_any(const WgradNhwc<acc_t<T>>& g) {
  const int count = g.tap_rows * g.tap_cols;
  for_wgrad<T>(g, [&](int i, int j, int j_end, int at, acc_t<T>* dw) {
    int t = 0;
    for (; t + 8 <= count; t += 8, dw += 8 * g.block) wgrad_taps<T, 1, 0, 8>(g, t, i, j, j_end, at, dw);
    for (; t < count; ++t, dw += g.block) wgrad_taps<T, 1, 0, 1>(g, t, i, j, j_end, at, dw);
  });
}

template <class T>
void wgrad_nhwc(const WgradNhwc<acc_t<T>>& g) {
  if (g.x.tap_col == 1 && g.x.step_col == 1) {
    switch (g.tap_cols) {
      case 3: return wgrad_rows<T, 3, 1>(g);
      case 5: return wgrad_rows<T, 5, 1>(g);
      case 7: return wgrad_rows<T, 7, 1>(g);
    }
  } else if (g.x.tap_col == 1 && g.x.step_col == 2) {
    switch (g.tap_cols) {
      case 3: return wgrad_rows<T, 3, 2>(g);
      case 5: return wgrad_rows<T, 5, 2>(g);
      case 7: return wgrad_rows<T, 7, 2>(g);
    }
  }
  wgrad_any<T>(g);
}

// NCHW ---------------------------------------------------------------------------------------------------------------

template <int L, class A>
struct index_of {
  typedef vec<i32, L> type;
};
template <int L>
struct index_of<L, double> {
  typedef vec<long long, L> type;
};

// 2L neighbours in memory order <-> their L even and L odd elements.
template <class A, int L>
inline void split(vec<A, L> a, vec<A, L> b, vec<A, L>& even, vec<A, L>& odd) {
  typename index_of<L, A>::type pick;
  for (int i = 0; i < L; ++i) pick[i] = 2 * i;
#if defined(__clang__)
  for (int i = 0; i < L; ++i) {
    const int k = 2 * i % L;
    even[i] = 2 * i < L ? a[k] : b[k];
    odd[i] = 2 * i < L ? a[k + 1] : b[k + 1];
  }
#else
  even = __builtin_shuffle(a, b, pick);
  odd = __builtin_shuffle(a, b, pick + 1);
#endif
}
template <class A, int L>
inline void merge(vec<A, L> even, vec<A, L> odd, vec<A, L>& a, vec<A, L>& b) {
  typename index_of<L, A>::type pick;
  for (int i = 0; i < L; ++i) pick[i] = i / 2 + i % 2 * L;
#if defined(__clang__)
  for (int i = 0; i < L; ++i) {
    a[i] = i % 2 ? odd[i / 2] : even[i / 2];
    b[i] = i % 2 ? odd[L / 2 + i / 2] : even[L / 2 + i / 2];
  }
#else
  a = __builtin_shuffle(even, odd, pick);
  b = __builtin_shuffle(even, odd, pick + L / 2);
#endif
}

template <class T>
void stage_nchw(const StageNchw<acc_t<T>>& s) {
  typedef acc_t<T> A;
  constexpr int L = kLanes<A>;
  zero(s.tile, s.size);
  if (s.col_lo >= s.col_hi) return;
  const int cols = s.col_hi - s.col_lo;
  const auto get = [&](auto l, const T* p) {
    constexpr int n = l.value;
    const vec<A, n> x = load<n>(p);
    if (!s.affine.any) return x;
    return apply<n, A>(s.affine, x, broadcast<n>(*s.affine.center), broadcast<n>(*s.affine.scale),
                       broadcast<n>(*s.affine.shift));
  };
  for (int i = s.row_lo; i < s.row_hi; ++i) {
    const T* src = static_cast<const T*>(s.src) + (i - s.row_lo) * s.row;
    A* dst = s.tile + i % s.stride_h * s.stride_w * s.plane + i / s.stride_h * s.pitch;
    if (s.stride_w == 1) {
      dst += s.col_lo;
      for_lanes_overlapping<L>(cols, [&](auto l, int j) { store<l.value>(dst + j, get(l, src + j)); });
      continue;
    }
    int j = 0;
    const auto single = [&] {
      const int col = s.col_lo + j;
      store<1>(dst + col % s.stride_w * s.plane + col / s.stride_w, get(constant<1>{}, src + j));
      ++j;
    };
    if (s.stride_w == 2) {
      if (s.col_lo % 2) single();
      for (; j + 2 * L <= cols; j += 2 * L) {
        vec<A, L> even, odd;
        split<A, L>(get(constant<L>{}, src + j), get(constant<L>{}, src + j + L), even, odd);
        A* pair = dst + (s.col_lo + j) / 2;
        store<L>(pair, even);
        store<L>(pair + s.plane, odd);
      }
    }
    while (j < cols) single();
  }
}

template <class T>
void store_nchw(const StoreNchw<acc_t<T>>& s) {
  typedef acc_t<T> A;
  constexpr int L = kLanes<A>;
  const AffineGrad<A>& g = s.grad;
  A dscale = 0, dshift = 0;
  for (int i = 0; i < s.rows; ++i) {
    const A* src = s.tile + i * s.pitch;
    T* dst = static_cast<T*>(s.dst) + i * s.row;
    const T* x = static_cast<const T*>(g.x) + i * g.x_row;
    const auto put = [&](auto l, int j, auto du) {
      constexpr int n = l.value;
      if (g.affine.any) {
        const vec<A, n> value = load<n>(x + j), center = broadcast<n>(*g.affine.center);
        const vec<A, n> scale = broadcast<n>(*g.affine.scale);
        du = masked<n, A>(g.affine, du, value, center, scale, broadcast<n>(*g.affine.shift));
        dscale += sum<n, A>(du * (value - center));
        dshift += sum<n, A>(du);
        du *= scale;
      }
      store<n>(dst + j, du);
    };
    if (s.phases == 1) {
      const auto copy = [&](auto l, int j) { put(l, j, load<l.value>(src + j)); };
      if (g.affine.any) for_lanes<L>(s.cols, copy);
      else for_lanes_overlapping<L>(s.cols, copy);
      continue;
    }
    int j = 0;
    if (s.phases == 2) {
      for (; j + 2 * L <= s.cols; j += 2 * L) {
        vec<A, L> a, b;
        merge<A, L>(load<L>(src + j / 2), load<L>(src + s.plane + j / 2), a, b);
        put(constant<L>{}, j, a);
        put(constant<L>{}, j + L, b);
      }
    }
    for (; j < s.cols; ++j) put(constant<1>{}, j, load<1>(src + j % s.phases * s.plane + j / s.phases));
  }
  if (g.dscale) *g.dscale += dscale;
  if (g.dshift) *g.dshift += dshift;
}

template <class A, int kVectors>
inline void conv_vectors(const ConvNchw<A>& c, ptrdiff_t i) {
  constexpr int L = kLanes<A>;
  vec<A, L> acc[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) acc[v] = broadcast<L>(c.init);
  for (int t = 0; t < c.tap_count; ++t) {
    const vec<A, L> weight = broadcast<L>(c.weights[t]);
    const A* x = c.tile + i + c.taps[t];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) acc[v] += load<L>(x + v * L) * weight;
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) store<L>(c.out + i + v * L, acc[v]);
}

template <class A>
void conv_nchw(const ConvNchw<A>& c) {
  constexpr int L = kLanes<A>;
  ptrdiff_t i = 0;
  for (; i + 8 * L <= c.count; i += 8 * L) conv_vectors<A, 8>(c, i);
  if (i + 4 * L <= c.count) conv_vectors<A, 4>(c, i), i += 4 * L;
  if (i + 2 * L <= c.count) conv_vectors<A, 2>(c, i), i += 2 * L;
  for (; i < c.count; i += L) conv_vectors<A, 1>(c, i);
}

template <class A, int kTaps>
inline void wgrad_group(const WgradNchw<A>& g, int first) {
  constexpr int L = kLanes<A>;
  vec<A, L> acc[kTaps] = {};
  const A* x[kTaps];
  for (int t = 0; t < kTaps; ++t) x[t] = g.x + g.taps[first + t];
  const auto step = [&](ptrdiff_t i, vec<A, L> d) {
#pragma GCC unroll 9
    for (int t = 0; t < kTaps; ++t) acc[t] += load<L>(x[t] + i) * d;
  };
  ptrdiff_t i = 0;
  for (; i + L <= g.count; i += L) step(i, load<L>(g.dy + i));
  if (i < g.count) {  // what follows dy's last element is not zero
    A last[L] = {};
    __builtin_memcpy(last, g.dy + i, (g.count - i) * sizeof(A));
    step(i, load<L>(last));
  }
#pragma GCC unroll 9
  for (int t = 0; t < kTaps; ++t) g.dw[first + t] += sum<L, A>(acc[t]);
}

template <class A>
void wgrad_nchw(const WgradNchw<A>& g) {
  int t = 0;
  for (; t + 9 <= g.tap_count; t += 9) wgrad_group<A, 9>(g, t);
  if (t + 8 <= g.tap_count) wgrad_group<A, 8>(g, t), t += 8;
  if (t + 4 <= g.tap_count) wgrad_group<A, 4>(g, t), t += 4;
  for (; t < g.tap_count; ++t) wgrad_group<A, 1>(g, t);
}

template <class T>
constexpr Kernels<acc_t<T>> kernels_of() {
  typedef acc_t<T> A;
  return {stage_nhwc<T>, store_nhwc<T>, conv_nhwc<T>,  conv_nhwc<A>,  wgrad_nhwc<T>,
          wgrad_nhwc<A>, stage_nchw<T>, store_nchw<T>, conv_nchw<A>, wgrad_nchw<A>};
}

#define XSEP_STRING_(x) #x
#define XSEP_STRING(x) XSEP_STRING_(x)
extern const Isa isa = {XSEP_STRING(XSEP_ISA), kernels_of<float>(), kernels_of<half_t>(), kernels_of<bfloat16_t>(),
                        kernels_of<double>()};

}  // namespace xsep::cpu::XSEP_ISA
