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
void stage_nhwc(const Stage<acc_t<T>>& s) {
  typedef acc_t<T> A;
  constexpr int L = kLanes<A>;
  for (int i = 0; i < s.rows; ++i) {
    A* dst = s.tile + ptrdiff_t{i} * s.cols * kBlock<acc_t<T>>;
    if (i < s.row_lo || i >= s.row_hi || s.col_lo >= s.col_hi) {
      zero(dst, ptrdiff_t{s.cols} * kBlock<acc_t<T>>);
      continue;
    }
    zero(dst, ptrdiff_t{s.col_lo} * kBlock<acc_t<T>>);
    zero(dst + ptrdiff_t{s.col_hi} * kBlock<acc_t<T>>, ptrdiff_t{s.cols - s.col_hi} * kBlock<acc_t<T>>);
    dst += ptrdiff_t{s.col_lo} * kBlock<acc_t<T>>;
    const T* src = static_cast<const T*>(s.src) + (i - s.row_lo) * s.row;
    if (s.lanes == kBlock<acc_t<T>> && s.lane == 1 && !s.affine.any) {
      for (int j = s.col_lo; j < s.col_hi; ++j, src += s.pixel, dst += kBlock<acc_t<T>>) {
        for (int c = 0; c < kBlock<acc_t<T>>; c += L) store<L>(dst + c, load<L>(src + c));
      }
      continue;
    }
    for (int j = s.col_lo; j < s.col_hi; ++j, src += s.pixel, dst += kBlock<acc_t<T>>) {
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
      zero(dst + s.lanes, kBlock<acc_t<T>> - s.lanes);
    }
  }
}

// A row of du becomes dx, and is summed in registers before it joins the sums of the rows above: short sums are exact.
template <int L, class T>
inline void store_affine_row(const Store<acc_t<T>>& s, const acc_t<T>* src, T* dst, const T* x, int c) {
  typedef acc_t<T> A;
  const AffineGrad<A>& g = s.grad;
  const vec<A, L> center = load<L>(g.affine.center + c), scale = load<L>(g.affine.scale + c);
  const vec<A, L> shift = load<L>(g.affine.shift + c);
  vec<A, L> dscale = {}, dshift = {};
  for (int j = 0; j < s.cols; ++j) {
    const vec<A, L> value = load<L>(x + j * g.x_pixel + c);
    const vec<A, L> du = masked<L, A>(g.affine, load<L>(src + j * kBlock<acc_t<T>> + c), value, center, scale, shift);
    store<L>(dst + j * s.pixel + c, du * scale);
    dscale += du * (value - center);
    dshift += du;
  }
  if (g.dscale) store<L>(g.dscale + c, load<L>(g.dscale + c) + dscale);
  if (g.dshift) store<L>(g.dshift + c, load<L>(g.dshift + c) + dshift);
}

template <class T>
void store_nhwc(const Store<acc_t<T>>& s) {
  typedef acc_t<T> A;
  constexpr int L = kLanes<A>;
  for (int i = 0; i < s.rows; ++i) {
    const A* src = s.tile + ptrdiff_t{i} * s.cols * kBlock<acc_t<T>>;
    T* dst = static_cast<T*>(s.dst) + i * s.row;
    if (s.grad.affine.any) {
      const T* x = static_cast<const T*>(s.grad.x) + i * s.grad.x_row;
      for_lanes<L>(s.lanes, [&](auto l, int c) { store_affine_row<l.value, T>(s, src, dst, x, c); });
      continue;
    }
    for (int j = 0; j < s.cols; ++j, src += kBlock<acc_t<T>>, dst += s.pixel) {
      if (s.lane != 1) {
        for (int c = 0; c < s.lanes; ++c) store<1>(dst + c * s.lane, load<1>(src + c));
      } else {
        for_lanes<L>(s.lanes, [&](auto l, int c) { store<l.value>(dst + c, load<l.value>(src + c)); });
      }
    }
  }
}

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

constexpr int kRegisters = kVectorBytes == 64 ? 32 : 16;

// Past the caches, for outputs that would not stay in them: a line that is written whole need not be read first.
// `p` is aligned to the vector.
template <int L, class T>
inline void stream(T* p, vec<acc_t<T>, L> value) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) * L == 64) return _mm512_stream_ps(reinterpret_cast<float*>(p), (__m512)value);
#endif
  store<L>(p, value);
}

// The outputs that one vector of channels computes at a time: as many rows of four as leave registers for the pixels of
// one input row and a weight.  Every pixel is then loaded once for all the outputs that it belongs to.
template <int kTaps, int kStep>
struct ConvTile {
  static constexpr int kCols = 4, kPixels = (kCols - 1) * kStep + kTaps, kFree = kRegisters - kPixels - 1;
  static constexpr int kRows = kFree >= 4 * kCols ? 4 : kFree >= 2 * kCols ? 2 : 1;
};

// Left alone, GCC computes the addresses of all that a tile touches before the loop over channels, and keeps them on
// the stack: this makes it take them from the pointer, where an addressing mode does it.
template <class P>
inline void keep_pointer(P*& p) {
  asm("" : "+r"(p));
}

template <class T>
inline const T* bytes_on(const T* p, ptrdiff_t bytes) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(p) + bytes);
}
template <class T>
inline T* bytes_on(T* p, ptrdiff_t bytes) {
  return reinterpret_cast<T*>(reinterpret_cast<char*>(p) + bytes);
}

// Filter rows of kTaps neighbours; outputs lie kStep pixels apart in both directions.  Makes `rows` x kCols outputs,
// with at most as many rows as a tile has.  `in` is the pixel that tap (0, 0) of output (0, 0) meets: its position is
// (row, col). kSquare: a whole tile and a square filter, so that which taps a row of pixels meets is known in advance.
// kBorder: some columns of pixels may not exist.
template <class T, int kTaps, int kStep, int kCols, bool kSquare, bool kBorder>
inline void conv_tile(const Conv<acc_t<T>>& c, const T* in, int row, int col, int rows, const acc_t<T>* w,
                      const acc_t<T>* init, T* out) {
  typedef acc_t<T> A;
  constexpr int L = kLanes<A>, kPixels = (kCols - 1) * kStep + kTaps, kRows = ConvTile<kTaps, kStep>::kRows;
  const ptrdiff_t x_row = c.in.row * sizeof(T), x_pixel = c.in.pixel * sizeof(T);
  const ptrdiff_t out_row = c.out_row * sizeof(T), out_pixel = c.out_pixel * sizeof(T);
  keep_pointer(in);
  keep_pointer(out);
  keep_pointer(w);
  vec<A, L> acc[kRows][kCols];
  if (init) {
    const vec<A, L> first = load<L>(init);
#pragma GCC unroll 8
    for (int t = 0; t < kRows; ++t) {
#pragma GCC unroll 8
      for (int q = 0; q < kCols; ++q) acc[t][q] = first;
    }
  } else {
#pragma GCC unroll 8
    for (int t = 0; t < kRows; ++t) {
      if (t >= rows) break;
#pragma GCC unroll 8
      for (int q = 0; q < kCols; ++q) acc[t][q] = load<L>(bytes_on(out, t * out_row + q * out_pixel));
    }
  }
  const auto add_row = [&](const T* x, int h, int rows, int tap_rows) __attribute__((always_inline)) {
    vec<A, L> pixel[kPixels];
#pragma GCC unroll 32
    for (int k = 0; k < kPixels; ++k) {
      if (kBorder && !inside(col + k, c.in.cols))
        pixel[k] = vec<A, L>{};
      else
        pixel[k] = load<L>(bytes_on(x, k * x_pixel));
      keep_in_register(pixel[k]);
    }
#pragma GCC unroll 8
    for (int t = 0; t < kRows; ++t) {
      const int r = h - t * kStep;
      if (!inside(r, tap_rows) || t >= rows) continue;
#pragma GCC unroll 8
      for (int s = 0; s < kTaps; ++s) {
        vec<A, L> weight = load<L>(w + (r * kTaps + s) * kBlock<A>);
        keep_in_register(weight);
#pragma GCC unroll 8
        for (int q = 0; q < kCols; ++q) acc[t][q] += pixel[q * kStep + s] * weight;
      }
    }
  };
  if constexpr (kSquare) {
#pragma GCC unroll 16
    for (int h = 0; h < (kRows - 1) * kStep + kTaps; ++h) {
      if (inside(row + h, c.in.rows)) add_row(in, h, kRows, kTaps);
      in = bytes_on(in, x_row);
      keep_pointer(in);
    }
  } else {
    const int h_lo = row < 0 ? -row : 0, all = (rows - 1) * kStep + c.tap_rows;
    const int h_hi = all < c.in.rows - row ? all : c.in.rows - row;
    in = bytes_on(in, h_lo * x_row);
    for (int h = h_lo; h < h_hi; ++h) {
      add_row(in, h, rows, c.tap_rows);
      in = bytes_on(in, x_row);
      keep_pointer(in);
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < kRows; ++t) {
    if (t >= rows) break;
#pragma GCC unroll 8
    for (int q = 0; q < kCols; ++q) {
      T* dst = bytes_on(out, q * out_pixel);
      if (c.stream)
        stream<L>(dst, acc[t][q]);
      else
        store<L>(dst, acc[t][q]);
    }
    out = bytes_on(out, out_row);
    keep_pointer(out);
  }
}

// Asks for `rows` x `cols` pixels that the rows below will need, as far as they exist, to come into the second-level
// cache: channels lie apart by the pixel, which hardware prefetchers do not follow well.
template <class T>
inline void prefetch(const Pixels& x, int row, int rows, int col, int cols, int at) {
  const int row_end = row + rows < x.rows ? row + rows : x.rows, col_end = col + cols < x.cols ? col + cols : x.cols;
  for (int h = row; h < row_end; ++h) {
    for (int k = col < 0 ? 0 : col; k < col_end; ++k) {
      __builtin_prefetch(static_cast<const T*>(x.data) + h * x.row + k * x.pixel + at, 0, 2);
    }
  }
}

// f(constant<count>, j) over [0, n), four columns at a time if possible; with `overlap` some may come twice.
template <class F>
inline void for_columns(int n, bool overlap, F&& f) {
  int j = 0;
  for (; j + 4 <= n; j += 4) f(constant<4>{}, j);
  if (overlap && n - j == 3 && n > 4) return f(constant<4>{}, n - 4);
  if (n - j >= 2) f(constant<2>{}, j), j += 2;
  if (j < n) f(constant<1>{}, j);
}

template <class T, int kTaps, int kStep>
void conv_dense(const Conv<acc_t<T>>& args) {
  typedef acc_t<T> A;
  constexpr int kRows = ConvTile<kTaps, kStep>::kRows, kLine = 64 / sizeof(T);
  const Conv<A> c = args;  // a copy, which no store through a pointer can be thought to change
  for (int i = 0; i < c.rows; i += kRows) {
    const int rows = kRows < c.rows - i ? kRows : c.rows - i, row = c.in.first_row + i * kStep;
    const int below = row + (rows - 1) * kStep + c.tap_rows;
    // Larger filters do enough with a pixel as it is.
    const bool square = kTaps == 3 && rows == kRows && c.tap_rows == 3;
    for_columns(c.cols, c.init != nullptr, [&](auto cols, int j) {  // adding to out twice would count twice
      constexpr int kCols = cols.value;
      const int col = c.in.first_col + j * kStep;
      const bool border = kCols < 4 || col < 0 || col + (kCols - 1) * kStep + kTaps > c.in.cols;
      const T* in = static_cast<const T*>(c.in.data) + row * c.in.row + col * c.in.pixel;
      T* out = static_cast<T*>(c.out) + i * c.out_row + j * c.out_pixel;
      const auto channels = [&](auto is_square, auto is_border) {
        // Channels innermost: memory is walked in order.
        for (int b = 0; b < c.blocks; ++b) {
          for (int v = 0; v < kBlock<A>; v += kLanes<A>) {
            const int at = b * kBlock<A> + v;
            if (at % kLine == 0) prefetch<T>(c.in, below, kRows * kStep, col, kCols * kStep, at);
            conv_tile<T, kTaps, kStep, kCols, is_square.value, is_border.value>(
                c, in + at, row, col, rows, c.weights + b * c.weights_step + v, c.init ? c.init + at : nullptr,
                out + at);
          }
        }
      };
      if constexpr (kTaps == 3) {
        if (square)
          return border ? channels(constant<1>{}, constant<1>{}) : channels(constant<1>{}, constant < kCols<4>{});
      }
      border ? channels(constant<0>{}, constant<1>{}) : channels(constant<0>{}, constant < kCols<4>{});
    });
  }
}

// Any taps: four outputs of a row share a weight, and load their own pixels.
template <class T, int kCols>
inline void conv_any_tile(const Conv<acc_t<T>>& c, int row, int col, int at, const acc_t<T>* w, const acc_t<T>* init,
                          T* out) {
  typedef acc_t<T> A;
  constexpr int L = kLanes<A>;
  vec<A, L> acc[kCols];
#pragma GCC unroll 8
  for (int q = 0; q < kCols; ++q) acc[q] = init ? load<L>(init) : load<L>(out + q * c.out_pixel);
  const Pixels& x = c.in;
  for (int r = 0; r < c.tap_rows; ++r) {
    const int h = row + r * x.tap_row;
    if (!inside(h, x.rows)) continue;
    for (int s = 0; s < c.tap_cols; ++s) {
      const vec<A, L> weight = load<L>(w + (r * c.tap_cols + s) * kBlock<acc_t<T>>);
#pragma GCC unroll 8
      for (int q = 0; q < kCols; ++q) {
        const int k = col + q * x.step_col + s * x.tap_col;
        if (inside(k, x.cols)) acc[q] += load<L>(static_cast<const T*>(x.data) + h * x.row + k * x.pixel + at) * weight;
      }
    }
  }
#pragma GCC unroll 8
  for (int q = 0; q < kCols; ++q) store<L>(out + q * c.out_pixel, acc[q]);
}

template <class T>
void conv_any(const Conv<acc_t<T>>& args) {
  const Conv<acc_t<T>> c = args;
  for (int i = 0; i < c.rows; ++i) {
    for_columns(c.cols, c.init != nullptr, [&](auto cols, int j) {
      const int row = c.in.first_row + i * c.in.step_row, col = c.in.first_col + j * c.in.step_col;
      T* out = static_cast<T*>(c.out) + i * c.out_row + j * c.out_pixel;
      for (int b = 0; b < c.blocks; ++b) {
        for (int v = 0; v < kBlock<acc_t<T>>; v += kLanes<acc_t<T>>) {
          const int at = b * kBlock<acc_t<T>> + v;
          conv_any_tile<T, cols.value>(c, row, col, at, c.weights + b * c.weights_step + v,
                                       c.init ? c.init + at : nullptr, out + at);
        }
      }
    });
  }
}

template <class T>
void conv(const Conv<acc_t<T>>& c) {
  const Pixels& x = c.in;
  if (x.tap_row == 1 && x.tap_col == 1 && x.step_row == 1 && x.step_col == 1) {
    switch (c.tap_cols) {
      case 1:
        return conv_dense<T, 1, 1>(c);
      case 2:
        return conv_dense<T, 2, 1>(c);
      case 3:
        return conv_dense<T, 3, 1>(c);
      case 4:
        return conv_dense<T, 4, 1>(c);
      case 5:
        return conv_dense<T, 5, 1>(c);
      case 7:
        return conv_dense<T, 7, 1>(c);
    }
  } else if (x.tap_row == 1 && x.tap_col == 1 && x.step_row == 2 && x.step_col == 2) {
    switch (c.tap_cols) {
      case 3:
        return conv_dense<T, 3, 2>(c);
      case 5:
        return conv_dense<T, 5, 2>(c);
      case 7:
        return conv_dense<T, 7, 2>(c);
    }
  }
  conv_any<T>(c);
}

// What one step of wgrad holds: sums for kTapRows filter rows, kRows x 4 elements of dy, and a pixel.
template <int kTaps>
struct WgradTile {
  static constexpr int kCols = 4;
  static constexpr int kTapRows = kTaps == 3 ? 3 : kTaps == 5 && kRegisters == 32 ? 5 : 1;
  static constexpr int kFree = kRegisters - kTapRows * kTaps - 1;
  static constexpr int kRows = kFree >= 4 * kCols ? 4 : kFree >= 2 * kCols ? 2 : 1;
};

// Adds to dw what rows [i, i + kRows) and columns [j, j_end) of dy give to the tap rows from `first` on.  Where dy ends
// it is taken for zero: pixels of x are multiplied by that zero.
template <class T, int kTaps, int kStep>
inline void wgrad_tile(const Wgrad<acc_t<T>>& g, int first, int i, int j, int j_end, int at, acc_t<T>* dw) {
  typedef acc_t<T> A;
  typedef WgradTile<kTaps> Tile;
  constexpr int L = kLanes<A>, kRows = Tile::kRows, kCols = Tile::kCols, kTapRows = Tile::kTapRows;
  const Pixels& x = g.x;
  const ptrdiff_t x_row = x.row * sizeof(T), x_pixel = x.pixel * sizeof(T);
  const ptrdiff_t dy_row = g.dy_row * sizeof(T), dy_pixel = g.dy_pixel * sizeof(T);
  const int row = x.first_row + i * kStep + first;
  vec<A, L> acc[kTapRows][kTaps] = {};
  for (; j < j_end; j += kCols) {
    vec<A, L> d[kRows][kCols];
    const T* dy = static_cast<const T*>(g.dy) + i * g.dy_row + j * g.dy_pixel + at;
    const int cols = j_end - j;
#pragma GCC unroll 8
    for (int t = 0; t < kRows; ++t) {
      keep_pointer(dy);
#pragma GCC unroll 8
      for (int q = 0; q < kCols; ++q) {
        if (i + t < g.rows && q < cols)
          d[t][q] = load<L>(bytes_on(dy, q * dy_pixel));
        else
          d[t][q] = vec<A, L>{};
        keep_in_register(d[t][q]);
      }
      dy = bytes_on(dy, dy_row);
    }
    const int col = x.first_col + j * kStep;
    const T* in = static_cast<const T*>(x.data) + row * x.row + col * x.pixel + at;
    const bool border = col < 0 || col + (kCols - 1) * kStep + kTaps > x.cols;
#pragma GCC unroll 16
    for (int h = 0; h < (kRows - 1) * kStep + kTapRows; ++h) {
      const T* pixels = in;
      in = bytes_on(in, x_row);
      keep_pointer(in);
      if (!inside(row + h, x.rows)) continue;
#pragma GCC unroll 32
      for (int k = 0; k < (kCols - 1) * kStep + kTaps; ++k) {
        vec<A, L> pixel;
        if (border && !inside(col + k, x.cols))
          pixel = vec<A, L>{};
        else
          pixel = load<L>(bytes_on(pixels, k * x_pixel));
        keep_in_register(pixel);
#pragma GCC unroll 8
        for (int t = 0; t < kRows; ++t) {
          const int r = h - t * kStep;
          if (r < 0 || r >= kTapRows) continue;
#pragma GCC unroll 8
          for (int q = 0; q < kCols; ++q) {
            const int s = k - q * kStep;
            if (s >= 0 && s < kTaps) acc[r][s] += pixel * d[t][q];
          }
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kTapRows; ++r) {
#pragma GCC unroll 8
    for (int s = 0; s < kTaps; ++s, dw += kBlock<acc_t<T>>) store<L>(dw, load<L>(dw) + acc[r][s]);
  }
}

// f(rows [i, i + kRows) of dy, its columns [j, j_end), channel, that channel's dw) over the tile: a stretch of columns,
// then every channel of it, so that memory is walked in order.  Out of the caches a long stretch is best, since the
// sums are loaded and stored for each; out of memory a short one, which fetches the channels of a pixel together.
template <class T, int kRows, int kStep, class F>
inline void for_wgrad(const Wgrad<acc_t<T>>& g, F&& f) {
  constexpr int kLine = 64 / sizeof(T);
  const int stretch = g.stream ? 4 : 20, stretches = (g.cols + stretch - 1) / stretch;
  const Pixels dy{g.dy, g.dy_row, g.dy_pixel, g.rows, g.cols, 0, 0, 1, 1, 1, 1};
  for (int i = 0; i < g.rows; i += kRows) {
    const int below = g.x.first_row + (i + kRows - 1) * kStep + g.tap_rows;
    for (int k = 0; k < stretches; ++k) {
      const int j = g.cols * k / stretches, j_end = g.cols * (k + 1) / stretches;
      for (int b = 0; b < g.blocks; ++b) {
        for (int v = 0; v < kBlock<acc_t<T>>; v += kLanes<acc_t<T>>) {
          const int at = b * kBlock<acc_t<T>> + v;
          if (kStep > 0 && at % kLine == 0) {
            prefetch<T>(dy, i + kRows, kRows, j, j_end - j, at);
            prefetch<T>(g.x, below, kRows * kStep, g.x.first_col + j * kStep, (j_end - j) * kStep, at);
          }
          f(i, j, j_end, at, g.dw + b * g.dw_step + v);
        }
      }
    }
  }
}

template <class T, int kTaps, int kStep>
void wgrad_dense(const Wgrad<acc_t<T>>& args) {
  typedef WgradTile<kTaps> Tile;
  const Wgrad<acc_t<T>> g = args;
  for_wgrad<T, Tile::kRows, kStep>(g, [&](int i, int j, int j_end, int at, acc_t<T>* dw) {
    for (int r = 0; r < g.tap_rows; r += Tile::kTapRows, dw += Tile::kTapRows * kTaps * kBlock<acc_t<T>>) {
      wgrad_tile<T, kTaps, kStep>(g, r, i, j, j_end, at, dw);
    }
  });
}

// Any taps, eight at a time.
template <class T, int kTaps>
inline void wgrad_any_taps(const Wgrad<acc_t<T>>& g, int first, int i, int j, int j_end, int at, acc_t<T>* dw) {
  typedef acc_t<T> A;
  constexpr int L = kLanes<A>;
  const Pixels& x = g.x;
  const T* dy = static_cast<const T*>(g.dy) + i * g.dy_row + at;
  vec<A, L> acc[kTaps] = {};
  int col[kTaps];
  const T* rows[kTaps];
  for (int t = 0; t < kTaps; ++t) {
    const int row = x.first_row + i * x.step_row + (first + t) / g.tap_cols * x.tap_row;
    col[t] = x.first_col + (first + t) % g.tap_cols * x.tap_col;
    rows[t] = inside(row, x.rows) ? static_cast<const T*>(x.data) + row * x.row + at : nullptr;
  }
  for (; j < j_end; ++j) {
    const vec<A, L> d = load<L>(dy + j * g.dy_pixel);
#pragma GCC unroll 8
    for (int t = 0; t < kTaps; ++t) {
      const int k = col[t] + j * x.step_col;
      if (rows[t] && inside(k, x.cols)) acc[t] += load<L>(rows[t] + k * x.pixel) * d;
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < kTaps; ++t, dw += kBlock<acc_t<T>>) store<L>(dw, load<L>(dw) + acc[t]);
}

template <class T>
void wgrad_any(const Wgrad<acc_t<T>>& args) {
  const Wgrad<acc_t<T>> g = args;
  const int count = g.tap_rows * g.tap_cols;
  for_wgrad<T, 1, 0>(g, [&](int i, int j, int j_end, int at, acc_t<T>* dw) {
    int t = 0;
    for (; t + 8 <= count; t += 8, dw += 8 * kBlock<acc_t<T>>) wgrad_any_taps<T, 8>(g, t, i, j, j_end, at, dw);
    for (; t < count; ++t, dw += kBlock<acc_t<T>>) wgrad_any_taps<T, 1>(g, t, i, j, j_end, at, dw);
  });
}

template <class T>
void wgrad(const Wgrad<acc_t<T>>& g) {
  const Pixels& x = g.x;
  if (x.tap_row == 1 && x.tap_col == 1 && x.step_row == x.step_col && g.tap_rows == g.tap_cols) {
    if (x.step_col == 1) {
      switch (g.tap_cols) {
        case 3:
          return wgrad_dense<T, 3, 1>(g);
        case 5:
          return wgrad_dense<T, 5, 1>(g);
        case 7:
          return wgrad_dense<T, 7, 1>(g);
      }
    } else if (x.step_col == 2) {
      switch (g.tap_cols) {
        case 3:
          return wgrad_dense<T, 3, 2>(g);
        case 5:
          return wgrad_dense<T, 5, 2>(g);
        case 7:
          return wgrad_dense<T, 7, 2>(g);
      }
    }
  }
  wgrad_any<T>(g);
}

template <int L, class A>
struct index_of {
  typedef vec<i32, L> type;
};
template <int L>
struct index_of<L, double> {
  typedef vec<long long, L> type;
};

// NCHW ---------------------------------------------------------------------------------------------------------------

// v[i][j] becomes v[j][i]: exchanges the off-diagonal halves of every 2w x 2w block, for w = 1, 2, 4, ...
template <int L, class A, int w = 1>
inline void transpose(vec<A, L>* v) {
  if constexpr (w < L) {
    typename index_of<L, A>::type low, high;
    for (int k = 0; k < L; ++k) {
      low[k] = k & w ? L + k - w : k;
      high[k] = k & w ? L + k : k + w;
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) {
      if (i & w) continue;
      const vec<A, L> a = v[i], b = v[i + w];
#if defined(__clang__)
      for (int k = 0; k < L; ++k) {
        v[i][k] = k & w ? b[k - w] : a[k];
        v[i + w][k] = k & w ? b[k] : a[k + w];
      }
#else
      v[i] = __builtin_shuffle(a, b, low);
      v[i + w] = __builtin_shuffle(a, b, high);
#endif
    }
    transpose<L, A, 2 * w>(v);
  }
}

// f(constant<n>, element offset, row, column) over an NCHW window of rows x cols pixels, n of them at a time; those of
// `dense` rows follow each other in memory, so that small images fill whole vectors.  `overlap`: some pixels may come
// twice.
template <int L, class F>
inline void for_pixels(int rows, int cols, ptrdiff_t row, bool dense, bool overlap, F&& f) {
  const int runs = dense ? 1 : rows, length = dense ? rows * cols : cols;
  for (int i = 0; i < runs; ++i) {
    const auto at = [&](auto n, int k) { f(n, i * row + k, dense ? k / cols : i, dense ? k % cols : k); };
    int k = 0;
    for (; k + L <= length; k += L) at(constant<L>{}, k);
    if (k < length && overlap && length > L)
      at(constant<L>{}, length - L);
    else
      for (; k < length; ++k) at(constant<1>{}, k);
  }
}

// A walk over the pixels of a window that lies in a tile.
struct Walk {
  int col, cols;
  ptrdiff_t skip;  // from the end of a row to the next
  ptrdiff_t at;

  void step(int block) {
    at += block;
    if (++col == cols) col = 0, at += skip;
  }
};

template <class T>
void stage_nchw(const Stage<acc_t<T>>& s) {
  typedef acc_t<T> A;
  constexpr int L = kLanes<A>, B = kBlock<A>;
  const ptrdiff_t tile_row = ptrdiff_t{s.cols} * B;
  const int cols = s.col_hi - s.col_lo;
  for (int i = 0; i < s.rows; ++i) {
    A* dst = s.tile + i * tile_row;
    if (i < s.row_lo || i >= s.row_hi || cols <= 0) {
      zero(dst, tile_row);
    } else {
      zero(dst, ptrdiff_t{s.col_lo} * B);
      zero(dst + ptrdiff_t{s.col_hi} * B, ptrdiff_t{s.cols - s.col_hi} * B);
    }
  }
  if (cols <= 0) return;
  A* const window = s.tile + s.row_lo * tile_row + ptrdiff_t{s.col_lo} * B;
  for (int c = 0; c < B; c += L) {
    const T* src = static_cast<const T*>(s.src) + c * s.lane;
    const int lanes = s.lanes - c < L ? s.lanes - c : L;
    for_pixels<L>(s.row_hi - s.row_lo, cols, s.row, s.row == cols, true,
                  [&](auto count, ptrdiff_t at, int row, int col) {
                    constexpr int n = count.value;
                    Walk walk{col, cols, tile_row - ptrdiff_t{cols} * B, row * tile_row + ptrdiff_t{col} * B + c};
                    const auto get = [&](int i) {
                      const vec<A, n> x = load<n>(src + i * s.lane + at);
                      if (!s.affine.any) return x;
                      return apply<n, A>(s.affine, x, broadcast<n>(s.affine.center[c + i]),
                                         broadcast<n>(s.affine.scale[c + i]), broadcast<n>(s.affine.shift[c + i]));
                    };
                    if constexpr (n == 1) {
                      for (int i = 0; i < L; ++i) window[walk.at + i] = i < lanes ? get(i)[0] : A{0};
                    } else {
                      vec<A, L> v[L];
#pragma GCC unroll 16
                      for (int i = 0; i < L; ++i) {
                        if (i < lanes)
                          v[i] = get(i);
                        else
                          v[i] = vec<A, L>{};
                      }
                      transpose<L, A>(v);
#pragma GCC unroll 16
                      for (int i = 0; i < L; ++i) {
                        store<L>(window + walk.at, v[i]);
                        walk.step(B);
                      }
                    }
                  });
  }
}

template <class T>
void store_nchw(const Store<acc_t<T>>& s) {
  typedef acc_t<T> A;
  constexpr int L = kLanes<A>, B = kBlock<A>;
  const AffineGrad<A>& g = s.grad;
  for (int c = 0; c < s.lanes; c += L) {
    T* dst = static_cast<T*>(s.dst) + c * s.lane;
    const T* x = static_cast<const T*>(g.x) + c * g.x_lane;
    const int lanes = s.lanes - c < L ? s.lanes - c : L;
    vec<A, L> dscale[L] = {}, dshift[L] = {};
    const bool dense = s.row == s.cols && (!g.affine.any || g.x_row == s.cols);
    for_pixels<L>(s.rows, s.cols, s.row, dense, !g.affine.any, [&](auto count, ptrdiff_t at, int row, int col) {
      constexpr int n = count.value;
      const A* src = s.tile + (ptrdiff_t{row} * s.cols + col) * B + c;  // rows of the tile follow each other
      const auto put = [&](int i, vec<A, n> du) {
        if (g.affine.any) {
          const vec<A, n> value = load<n>(x + i * g.x_lane + row * g.x_row + col),
                          center = broadcast<n>(g.affine.center[c + i]);
          const vec<A, n> scale = broadcast<n>(g.affine.scale[c + i]);
          du = masked<n, A>(g.affine, du, value, center, scale, broadcast<n>(g.affine.shift[c + i]));
          const vec<A, n> by_scale = du * (value - center);
          if constexpr (n == L) {
            dscale[i] += by_scale, dshift[i] += du;
          } else {
            dscale[i][0] += by_scale[0], dshift[i][0] += du[0];
          }
          du *= scale;
        }
        store<n>(dst + i * s.lane + at, du);
      };
      if constexpr (n == 1) {
        for (int i = 0; i < lanes; ++i) put(i, load<1>(src + i));
      } else {
        vec<A, L> v[L];
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) v[i] = load<L>(src + i * B);
        transpose<L, A>(v);
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) {
          if (i < lanes) put(i, v[i]);
        }
      }
    });
    for (int i = 0; i < lanes && g.affine.any; ++i) {
      if (g.dscale) g.dscale[c + i] += sum<L, A>(dscale[i]);
      if (g.dshift) g.dshift[c + i] += sum<L, A>(dshift[i]);
    }
  }
}

template <class T>
constexpr Kernels<acc_t<T>> kernels_of() {
  typedef acc_t<T> A;
  return {stage_nhwc<T>, stage_nchw<T>, conv<T>, conv<A>, wgrad<T>, wgrad<A>, store_nhwc<T>, store_nchw<T>};
}

#define XSEP_STRING_(x) #x
#define XSEP_STRING(x) XSEP_STRING_(x)
extern const Isa isa = {XSEP_STRING(XSEP_ISA), kernels_of<float>(), kernels_of<half_t>(), kernels_of<bfloat16_t>(),
                        kernels_of<double>()};

}  // namespace xsep::cpu::XSEP_ISA
