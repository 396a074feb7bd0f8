// The end of a residual module, row by row: max-pool, BatchNorm and sum, and their gradients.
// Part of kernels.cpp, inside its namespace.

// The part of a window that lies inside y: its first pixel, its extents, and the number of its first tap.
template <class T>
struct Window {
  Window(const Pixels& y, int tap_rows, int tap_cols, int j) {
    const int row = y.first_row, col = y.first_col + j * y.step_col;
    const int above = row < 0 ? -row : 0, left = col < 0 ? -col : 0;
    first = static_cast<const T*>(y.data) + (row + above) * y.row + (col + left) * y.pixel;
    rows = (row + tap_rows < y.rows ? tap_rows : y.rows - row) - above;
    cols = (col + tap_cols < y.cols ? tap_cols : y.cols - col) - left;
    tap = above * tap_cols + left;
  }

  const T* first;
  int rows, cols, tap;
};

// f(constant<n>, constant<v>, c) over the channels, v vectors of n at a time from c on: each is a chain of its own.
template <int L, class F>
inline void for_vectors(int channels, F&& f) {
  constexpr int kTogether = 4;
  int c = 0;
  for (; c + kTogether * L <= channels; c += kTogether * L) f(constant<L>{}, constant<kTogether>{}, c);
  for_lanes<L>(channels, [&](auto l, int i) __attribute__((always_inline)) { f(l, constant<1>{}, i); }, c);
}

// v vectors from channel c on of a window's largest pixels, and of the numbers of their taps if those are wanted.
template <int n, int v, bool kTaps, class T>
inline void largest(const Window<T>& w, const Pixels& y, int tap_cols, int c, vec<acc_t<T>, n>* most,
                    vec<acc_t<T>, n>* taps) {
  typedef acc_t<T> A;
#pragma GCC unroll 4
  for (int i = 0; i < v; ++i) {
    most[i] = load<n>(w.first + c + i * n);
    if (kTaps) taps[i] = broadcast<n>(static_cast<A>(w.tap));
  }
  for (int r = 0; r < w.rows; ++r) {
    for (int s = 0; s < w.cols; ++s) {
      const T* from = w.first + r * y.row + s * y.pixel + c;
      const vec<A, n> tap = broadcast<n>(static_cast<A>(w.tap + r * tap_cols + s));
#pragma GCC unroll 4
      for (int i = 0; i < v; ++i) {
        const vec<A, n> value = load<n>(from + i * n);
        const auto more = (value > most[i]) | (value != value);
        most[i] = more ? value : most[i];
        if (kTaps) taps[i] = more ? tap : taps[i];
      }
    }
  }
}

template <class T>
void residual_row(const ResidualRow<acc_t<T>>& p) {
  typedef acc_t<T> A;
  for (int j = 0; j < p.cols; ++j) {
    const Window<T> window(p.y, p.tap_rows, p.tap_cols, j);
    const T* skip = static_cast<const T*>(p.skip) + (p.skip ? j * p.skip_pixel : 0);
    T* out = static_cast<T*>(p.out) + j * p.out_pixel;
    for_vectors<kLanes<A>>(p.channels, [&](auto l, auto vectors, int first) __attribute__((always_inline)) {
      constexpr int n = l.value, v = vectors.value;
      vec<A, n> most[v];
      largest<n, v, false>(window, p.y, p.tap_cols, first, most, most);
#pragma GCC unroll 4
      for (int i = 0; i < v; ++i) {
        const int c = first + i * n;
        vec<A, n> sum = load<n>(p.scale + c) * (most[i] - load<n>(p.center + c)) + load<n>(p.shift + c);
        if (p.skip) {
          const vec<A, n> s = load<n>(skip + c);
          sum += p.skip_scale ? load<n>(p.skip_scale + c) * (s - load<n>(p.skip_center + c)) + load<n>(p.skip_shift + c)
                              : s;
        }
        store<n>(out + c, p.relu ? relu<n, A>(sum) : sum);
      }
    });
  }
}

template <int n, class A>
inline void add_to(A* to, vec<A, n> value) {
  store<n>(to, load<n>(to) + value);
}

template <class T>
void residual_row_grad(const ResidualRowGrad<acc_t<T>>& g) {
  typedef acc_t<T> A;
  const ResidualRow<A>& p = g.row;
  A *const dshift = g.sums, *const dscale = dshift + p.channels, *const dskip_scale = dscale + p.channels;
  zero(g.sums, ptrdiff_t{3} * p.channels);
  for (int j = 0; j < p.cols; ++j) {
    const Window<T> window(p.y, p.tap_rows, p.tap_cols, j);
    const ptrdiff_t at = ptrdiff_t{j} * p.channels;
    const T* dout = static_cast<const T*>(g.dout) + j * g.dout_pixel;
    const T* skip = static_cast<const T*>(p.skip) + (p.skip ? j * p.skip_pixel : 0);
    for_vectors<kLanes<A>>(p.channels, [&](auto l, auto vectors, int first) __attribute__((always_inline)) {
      constexpr int n = l.value, v = vectors.value;
      vec<A, n> most[v], taps[v];
      largest<n, v, true>(window, p.y, p.tap_cols, first, most, taps);
#pragma GCC unroll 4
      for (int i = 0; i < v; ++i) {
        const int c = first + i * n;
        vec<A, n> given = load<n>(dout + c);
        if (p.relu) {
          const vec<A, n> sum = load<n>(p.scale + c) * (most[i] - load<n>(p.center + c)) + load<n>(p.shift + c);
          given = sum <= A{0} ? vec<A, n>{} : given;
          taps[i] = sum <= A{0} ? broadcast<n>(A{kNoTap}) : taps[i];
        }
        if (g.choice) store<n>(g.choice + at + c, taps[i]);
        if (g.dy) store<n>(static_cast<T*>(g.dy) + at + c, load<n>(p.scale + c) * given);
        if (!g.dshift) continue;
        add_to<n>(dshift + c, given);
        add_to<n>(dscale + c, given * (most[i] - load<n>(p.center + c)));
        if (!p.skip) continue;
        store<n>(static_cast<T*>(g.dskip) + at + c, load<n>(p.skip_scale + c) * given);
        add_to<n>(dskip_scale + c, given * (load<n>(skip + c) - load<n>(p.skip_center + c)));
      }
    });
  }
  if (!g.dshift) return;
  for_lanes<kLanes<A>>(p.channels, [&](auto l, int c) __attribute__((always_inline)) {
    constexpr int n = l.value;
    add_to<n>(g.dshift + c, load<n>(dshift + c));
    add_to<n>(g.dscale + c, load<n>(dscale + c));
    if (p.skip) add_to<n>(g.dskip_scale + c, load<n>(dskip_scale + c));
  });
}

// The windows, of `count`, that a pixel lies in: [first, last].
inline void windows_of(int pixel, int pad, int taps, int step, int count, int& first, int& last) {
  const int start = pixel + pad - taps + 1;
  first = start > 0 ? (start + step - 1) / step : 0;
  last = (pixel + pad) / step;
  last = last < count ? last : count - 1;
}

template <class T>
void unpool_row(const Unpool<acc_t<T>>& u) {
  typedef acc_t<T> A;
  int p0, p1, q0, q1;
  windows_of(u.row, u.pad_row, u.tap_rows, u.step_row, u.out_rows, p0, p1);
  for (int j = 0; j < u.cols; ++j) {
    windows_of(j, u.pad_col, u.tap_cols, u.step_col, u.out_cols, q0, q1);
    T* dy = static_cast<T*>(u.dy) + ptrdiff_t{j} * u.channels;
    for_vectors<kLanes<A>>(u.channels, [&](auto l, auto vectors, int c) __attribute__((always_inline)) {
      constexpr int n = l.value, v = vectors.value;
      vec<A, n> sum[v] = {};
      for (int p = p0; p <= p1; ++p) {
        const T* dout = static_cast<const T*>(u.dout) + p * u.dout_row + c;
        const A* choice = u.choice + ptrdiff_t{p % u.choice_rows} * u.out_cols * u.channels + c;
        const int above = (u.row + u.pad_row - p * u.step_row) * u.tap_cols;
        for (int q = q0; q <= q1; ++q) {
          const vec<A, n> tap = broadcast<n>(static_cast<A>(above + j + u.pad_col - q * u.step_col));
#pragma GCC unroll 4
          for (int i = 0; i < v; ++i) {
            const vec<A, n> given = load<n>(dout + q * u.dout_pixel + i * n);
            sum[i] += load<n>(choice + ptrdiff_t{q} * u.channels + i * n) == tap ? given : vec<A, n>{};
          }
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < v; ++i) store<n>(dy + c + i * n, load<n>(u.scale + c + i * n) * sum[i]);
    });
  }
}
