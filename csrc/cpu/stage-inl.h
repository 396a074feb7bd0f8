// Between tensors and staged tiles: NHWC copies pixels, NCHW transposes vectors of pixels into vectors of channels.
// Part of kernels.cpp, inside its namespace.

// Pixels in advance that memory is asked for: those of a tile lie too far apart for hardware to follow.
constexpr int kAhead = 4;

template <class T>
void stage_nhwc(const Stage<acc_t<T>>& s) {
  typedef acc_t<T> A;
  constexpr int L = kLanes<A>, B = kBlock<A>, kLine = 64 / sizeof(T);
  A* dst = s.tile;
  const auto put = [&](auto l, A* to, const T* from, int c) __attribute__((always_inline)) {
    constexpr int n = l.value;
    vec<A, n> x = load<n>(from);
    if (s.affine.any) {
      x = apply<n, A>(s.affine, x, load<n>(s.affine.center + c), load<n>(s.affine.scale + c),
                      load<n>(s.affine.shift + c));
    }
    store<n>(to, s.add ? load<n>(to) + x : x);
  };
  for (int i = 0; i < s.rows; ++i) {
    const T* src = static_cast<const T*>(s.src) + i * s.row;
    for (int j = 0; j < s.cols; ++j, src += s.pixel, dst += s.tile_pixel) {
      A* to = dst;
      for (int b = 0; b < s.lanes; b += B, to += s.tile_block) {
        const int lanes = s.lanes - b < B ? s.lanes - b : B;
        if (s.lane != 1) {
          for (int c = 0; c < lanes; ++c) put(constant<1>{}, to + c, src + (b + c) * s.lane, b + c);
        } else {
          if (b % kLine == 0) __builtin_prefetch(src + kAhead * s.pixel + b, 0, 3);
          for_lanes<L>(lanes, [&](auto l, int c) { put(l, to + c, src + b + c, b + c); });
        }
        for (int c = lanes; c < B && !s.add; ++c) to[c] = 0;
      }
    }
  }
}

// A row of du becomes dx, and is summed in registers before it joins the sums of the rows above: short sums are exact.
// kVectors vectors of channels from c on at a time, of which `src` has the first.
template <int L, int kVectors, class T>
inline void store_affine_row(const Store<acc_t<T>>& s, const acc_t<T>* src, T* dst, const T* x, int c, ptrdiff_t sums) {
  typedef acc_t<T> A;
  const AffineGrad<A>& g = s.grad;
  vec<A, L> center[kVectors], scale[kVectors], shift[kVectors], dscale[kVectors] = {}, dshift[kVectors] = {};
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    center[v] = load<L>(g.affine.center + c + v * L), scale[v] = load<L>(g.affine.scale + c + v * L);
    shift[v] = load<L>(g.affine.shift + c + v * L);
  }
  for (int j = 0; j < s.cols; ++j) {
    __builtin_prefetch(x + (j + kAhead) * g.x_pixel + c, 0, 3);
    __builtin_prefetch(dst + (j + kAhead) * s.pixel + c, 1, 3);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int at = c + v * L;
      const vec<A, L> value = load<L>(x + j * g.x_pixel + at);
      const vec<A, L> du =
          masked<L, A>(g.affine, load<L>(src + j * s.tile_pixel + v * L), value, center[v], scale[v], shift[v]);
      store<L>(dst + j * s.pixel + at, du * scale[v]);
      dscale[v] += du * (value - center[v]);
      dshift[v] += du;
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const ptrdiff_t at = sums + v * L;
    if (g.dscale) store<L>(g.dscale + at, load<L>(g.dscale + at) + dscale[v]);
    if (g.dshift) store<L>(g.dshift + at, load<L>(g.dshift + at) + dshift[v]);
  }
}

template <class T>
void store_nhwc(const Store<acc_t<T>>& s) {
  typedef acc_t<T> A;
  constexpr int L = kLanes<A>, B = kBlock<A>, kLine = 64 / sizeof(T);
  for (int i = 0; i < s.rows; ++i) {
    const A* src = s.tile + i * s.cols * s.tile_pixel;
    T* dst = static_cast<T*>(s.dst) + i * s.row;
    if (s.grad.affine.any) {
      const T* x = static_cast<const T*>(s.grad.x) + i * s.grad.x_row;
      for (int b = 0; b < s.lanes; b += B, src += s.tile_block) {
        const int lanes = s.lanes - b < B ? s.lanes - b : B;
        const ptrdiff_t sums = b / B * s.grad.step;
        if (lanes == B)
          store_affine_row<L, B / L, T>(s, src, dst, x, b, sums);
        else
          for_lanes<L>(lanes,
                       [&](auto l, int c) { store_affine_row<l.value, 1, T>(s, src + c, dst, x, b + c, sums + c); });
      }
      continue;
    }
    for (int j = 0; j < s.cols; ++j, src += s.tile_pixel, dst += s.pixel) {
      const A* from = src;
      for (int b = 0; b < s.lanes; b += B, from += s.tile_block) {
        const int lanes = s.lanes - b < B ? s.lanes - b : B;
        if (s.lane != 1) {
          for (int c = 0; c < lanes; ++c) store<1>(dst + (b + c) * s.lane, load<1>(from + c));
        } else {
          if (b % kLine == 0) __builtin_prefetch(dst + 2 * kAhead * s.pixel + b, 1, 3);
          for_lanes<L>(lanes, [&](auto l, int c) { store<l.value>(dst + b + c, load<l.value>(from + c)); });
        }
      }
    }
  }
}

template <int L, class A>
struct index_of {
  typedef vec<i32, L> type;
};
template <int L>
struct index_of<L, double> {
  typedef vec<long long, L> type;
};

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

// f(constant<n>, offset in the tensor, pixel) over the rows x cols pixels of an NCHW tile, n of them at a time; those
// of `dense` rows follow each other in memory, so that small images fill whole vectors.  `overlap`: some pixels may
// come twice.
template <int L, class F>
inline void for_pixels(int rows, int cols, ptrdiff_t row, bool dense, bool overlap, F&& f) {
  const int runs = dense ? 1 : rows, length = dense ? rows * cols : cols;
  for (int i = 0; i < runs; ++i) {
    const auto at = [&](auto n, int k) __attribute__((always_inline)) { f(n, i * row + k, i * length + k); };
    int k = 0;
    for (; k + L <= length; k += L) at(constant<L>{}, k);
    if (k < length && overlap && length > L)
      at(constant<L>{}, length - L);
    else
      for (; k < length; ++k) at(constant<1>{}, k);
  }
}

template <class T>
void stage_nchw(const Stage<acc_t<T>>& s) {
  typedef acc_t<T> A;
  constexpr int L = kLanes<A>, B = kBlock<A>;
  for (int c = 0; c < B; c += L) {
    const T* src = static_cast<const T*>(s.src) + c * s.lane;
    const int lanes = s.lanes - c < L ? s.lanes - c : L;
    for_pixels<L>(s.rows, s.cols, s.row, s.row == s.cols, !s.add, [&](auto count, ptrdiff_t at, int pixel) {
      constexpr int n = count.value;
      A* dst = s.tile + pixel * s.tile_pixel + c;
      const auto get = [&](int i) {
        const vec<A, n> x = load<n>(src + i * s.lane + at);
        if (!s.affine.any) return x;
        return apply<n, A>(s.affine, x, broadcast<n>(s.affine.center[c + i]), broadcast<n>(s.affine.scale[c + i]),
                           broadcast<n>(s.affine.shift[c + i]));
      };
      if constexpr (n == 1) {
        for (int i = 0; i < L; ++i) dst[i] = (s.add ? dst[i] : A{0}) + (i < lanes ? get(i)[0] : A{0});
      } else {
        vec<A, L> v[L];
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) {
          if (i < lanes) {
            v[i] = get(i);
            __builtin_prefetch(src + i * s.lane + at + s.ahead, 0, 2);
          } else {
            v[i] = vec<A, L>{};
          }
        }
        transpose<L, A>(v);
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) {
          A* to = dst + i * s.tile_pixel;
          store<L>(to, s.add ? load<L>(to) + v[i] : v[i]);
        }
      }
    });
  }
}

// Copies past the caches, except for the cache lines that the copy shares with its neighbours.
inline void copy_streaming(char* dst, const char* src, ptrdiff_t bytes) {
  ptrdiff_t i = -static_cast<ptrdiff_t>(reinterpret_cast<uintptr_t>(dst) & 63) & 63;
  if (i + 64 <= bytes) {
    __builtin_memcpy(dst, src, i);
    for (; i + 64 <= bytes; i += 64) stream_line(dst + i, src + i);
    dst += i, src += i, bytes -= i;
  }
  __builtin_memcpy(dst, src, bytes);
}

// From [lanes][rows][cols] to where the tile lies in the tensor, in stretches as long as its strides allow.
template <class T>
void stream_planes(const Store<acc_t<T>>& s) {
  const ptrdiff_t plane = ptrdiff_t{s.rows} * s.cols;
  const bool dense = s.row == s.cols, whole = dense && s.lane == plane;
  const ptrdiff_t length = (whole ? s.lanes * plane : dense ? plane : s.cols) * sizeof(T);
  const char* src = static_cast<const char*>(s.planes);
  for (int i = 0; i < (whole ? 1 : s.lanes); ++i) {
    for (int h = 0; h < (dense ? 1 : s.rows); ++h, src += length) {
      copy_streaming(static_cast<char*>(s.dst) + (i * s.lane + h * s.row) * sizeof(T), src, length);
    }
  }
  finish_streaming();
}

// kGrad: what leaves is du, on its way to dx.
template <class T, bool kGrad>
inline void transpose_out(const Store<acc_t<T>>& s) {
  typedef acc_t<T> A;
  constexpr int L = kLanes<A>;
  const AffineGrad<A>& g = s.grad;
  const ptrdiff_t out_lane = s.planes ? ptrdiff_t{s.rows} * s.cols : s.lane, out_row = s.planes ? s.cols : s.row;
  const bool dense = out_row == s.cols && (!kGrad || g.x_row == s.cols);
  for (int c = 0; c < s.lanes; c += L) {
    T* dst = static_cast<T*>(s.planes ? s.planes : s.dst) + c * out_lane;
    const T* x = static_cast<const T*>(g.x) + c * g.x_lane;
    const int lanes = s.lanes - c < L ? s.lanes - c : L;
    vec<A, L> dscale[L] = {}, dshift[L] = {};
    for_pixels<L>(s.rows, s.cols, out_row, dense, !kGrad, [&](auto count, ptrdiff_t at, int pixel) {
      constexpr int n = count.value;
      const A* src = s.tile + pixel * s.tile_pixel + c;
      const auto put = [&](int i, vec<A, n> du) {
        if constexpr (kGrad) {
          const ptrdiff_t x_at = dense ? pixel : pixel / s.cols * g.x_row + pixel % s.cols;
          const vec<A, n> value = load<n>(x + i * g.x_lane + x_at), center = broadcast<n>(g.affine.center[c + i]);
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
        store<n>(dst + i * out_lane + at, du);
      };
      if constexpr (n == 1) {
        for (int i = 0; i < lanes; ++i) put(i, load<1>(src + i));
      } else {
        vec<A, L> v[L];
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) v[i] = load<L>(src + i * s.tile_pixel);
        transpose<L, A>(v);
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) {
          if (i < lanes) put(i, v[i]);
        }
      }
    });
    if constexpr (kGrad) {
      for (int i = 0; i < lanes; ++i) {
        if (g.dscale) g.dscale[c + i] += sum<L, A>(dscale[i]);
        if (g.dshift) g.dshift[c + i] += sum<L, A>(dshift[i]);
      }
    }
  }
}

template <class T>
void store_nchw(const Store<acc_t<T>>& s) {
  s.grad.affine.any ? transpose_out<T, true>(s) : transpose_out<T, false>(s);
  if (s.planes) stream_planes<T>(s);
}
