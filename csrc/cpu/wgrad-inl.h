// wgrad: sums over the elements of dy.  Part of kernels.cpp, inside its namespace.

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
inline void wgrad_tile(const Wgrad<acc_t<T>>& g, int first, int i, int j, int j_end, ptrdiff_t at, acc_t<T>* dw) {
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
          d[t][q] = in_register(load<L>(bytes_on(dy, q * dy_pixel)));
        else
          d[t][q] = vec<A, L>{};
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
          pixel = in_register(load<L>(bytes_on(pixels, k * x_pixel)));
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
// sums are loaded and stored for each; out of memory a short one, which fetches the channels of a pixel together.  The
// general loops (kStep 0) take one row at a time: in short stretches so few products would be added up before they are
// rounded into dw that its error doubles.
template <class T, int kRows, int kStep, class F>
inline void for_wgrad(const Wgrad<acc_t<T>>& g, F&& f) {
  constexpr int kLine = 64 / sizeof(T);
  const int stretch = g.stream && kStep > 0 ? 4 : 20, stretches = (g.cols + stretch - 1) / stretch;
  const int ahead = g.far ? kRows : 0;  // a branch around the calls would cost more
  const Pixels dy{g.dy, g.dy_row, g.dy_pixel, g.rows, g.cols, 0, 0, 1, 1, 1, 1};
  for (int i = 0; i < g.rows; i += kRows) {
    const int below = g.x.first_row + (i + kRows - 1) * kStep + g.tap_rows;
    for (int k = 0; k < stretches; ++k) {
      const int j = g.cols * k / stretches, j_end = g.cols * (k + 1) / stretches;
      for (int b = 0; b < g.blocks; ++b) {
        for (int v = 0; v < kBlock<acc_t<T>>; v += kLanes<acc_t<T>>) {
          const int packed = b * kBlock<acc_t<T>> + v;
          const ptrdiff_t at = b + 1 < g.blocks ? packed : g.last + v;
          if (kStep > 0 && packed % kLine == 0) {
            prefetch<T>(dy, i + kRows, ahead, j, j_end - j, at);
            prefetch<T>(g.x, below, ahead * kStep, g.x.first_col + j * kStep, (j_end - j) * kStep, at);
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
  for_wgrad<T, Tile::kRows, kStep>(g, [&](int i, int j, int j_end, ptrdiff_t at, acc_t<T>* dw) {
    for (int r = 0; r < g.tap_rows; r += Tile::kTapRows, dw += Tile::kTapRows * kTaps * kBlock<acc_t<T>>) {
      wgrad_tile<T, kTaps, kStep>(g, r, i, j, j_end, at, dw);
    }
  });
}

// Any taps, eight at a time.
template <class T, int kTaps>
inline void wgrad_any_taps(const Wgrad<acc_t<T>>& g, int first, int i, int j, int j_end, ptrdiff_t at, acc_t<T>* dw) {
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
  for_wgrad<T, 1, 0>(g, [&](int i, int j, int j_end, ptrdiff_t at, acc_t<T>* dw) {
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
