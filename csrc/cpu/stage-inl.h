// Between tensors and staged tiles: NHWC copies pixels, NCHW transposes vectors of pixels into vectors of channels.
// Part of kernels.cpp, inside its namespace.

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
