// fprop, and dgrad by residue classes: sums over the taps of a filter.  Part of kernels.cpp, inside its namespace.

constexpr int kRegisters = kVectorBytes == 64 ? 32 : 16;

template <class T>
constexpr bool kWholeLines = sizeof(T) * kLanes<acc_t<T>> == 64;  // a vector of outputs is a cache line

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
// with at most as many rows as a tile has.  `in` is the pixel that tap (0, 0) of output (0, 0) meets, at (row, col).
//
// kSquare: a whole tile and a square filter, so that which taps a row of pixels meets is known in advance.
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
        pixel[k] = in_register(load<L>(bytes_on(x, k * x_pixel)));
    }
#pragma GCC unroll 8
    for (int t = 0; t < kRows; ++t) {
      const int r = h - t * kStep;
      if (!inside(r, tap_rows) || t >= rows) continue;
#pragma GCC unroll 8
      for (int s = 0; s < kTaps; ++s) {
        const vec<A, L> weight = in_register(load<L>(w + (r * kTaps + s) * kBlock<A>));
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
      if (kWholeLines<T> && c.stream)
        stream_line(dst, &acc[t][q]);
      else
        store<L>(dst, acc[t][q]);
    }
    out = bytes_on(out, out_row);
    keep_pointer(out);
  }
}

// Asks for `rows` x `cols` pixels, as far as they exist, to come into the second-level cache: of large tensors, whose
// channels lie apart by the pixel, hardware prefetchers do not follow all that a tile touches.
template <class T>
inline void prefetch(const Pixels& x, int row, int rows, int col, int cols, ptrdiff_t at) {
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
  // Lines that go past the caches are put together here, where several vectors share one.
  alignas(64) T lines[kRows][4][kLine];
  const bool by_lines = !kWholeLines<T> && args.stream;
  const auto c = [&] {  // a copy, which no store through a pointer can be thought to change
    Conv<A> copy = args;
    if (by_lines) copy.out_row = 4 * kLine, copy.out_pixel = kLine;
    return copy;
  }();
  const Pixels outputs{args.out, args.out_row, args.out_pixel, c.rows, c.cols, 0, 0, 1, 1, 1, 1};
  for (int i = 0; i < c.rows; i += kRows) {
    const int rows = kRows < c.rows - i ? kRows : c.rows - i, row = c.in.first_row + i * kStep;
    const int below = row + (rows - 1) * kStep + c.tap_rows;
    // Larger filters do enough with a pixel as it is.
    const bool square = kTaps == 3 && rows == kRows && c.tap_rows == 3;
    for_columns(c.cols, c.init != nullptr, [&](auto cols, int j) {  // adding to out twice would count twice
      constexpr int kCols = cols.value, kAtBorder = kCols < 4;      // narrow tiles come at borders, mostly
      const int col = c.in.first_col + j * kStep;
      const bool border = kAtBorder || col < 0 || col + (kCols - 1) * kStep + kTaps > c.in.cols;
      const T* in = static_cast<const T*>(c.in.data) + row * c.in.row + col * c.in.pixel;
      T* out = static_cast<T*>(c.out) + i * args.out_row + j * args.out_pixel;
      const auto channels = [&](auto is_square, auto is_border) {
        // Channels innermost: memory is walked in order.
        for (int b = 0; b < c.blocks; ++b) {
          for (int v = 0; v < kBlock<A>; v += kLanes<A>) {
            const int packed = b * kBlock<A> + v;
            const ptrdiff_t at = b + 1 < c.blocks ? packed : c.last + v;
            if (packed % kLine == 0 && c.far) {
              // What the rows below will need; or the lines of outputs, which come to be read as well if they do not go
              // past the caches, unless the pixels of a wide filter are more than hardware follows.
              if (c.stream || kTaps > 3)
                prefetch<T>(c.in, below, kRows * kStep, col, kCols * kStep, at);
              else
                prefetch<T>(outputs, i, rows, j, kCols, at + 2 * kLine);
            }
            conv_tile<T, kTaps, kStep, kCols, is_square.value, is_border.value>(
                c, in + at, row, col, rows, c.weights + b * c.weights_step + v, c.init ? c.init + packed : nullptr,
                by_lines ? lines[0][0] + packed % kLine : out + at);
            if (by_lines && (packed + kLanes<A>) % kLine == 0) {
              T* dst = out + at + kLanes<A> - kLine;
              for (int t = 0; t < rows; ++t) {
                for (int q = 0; q < kCols; ++q) stream_line(dst + t * args.out_row + q * args.out_pixel, lines[t][q]);
              }
            }
          }
        }
      };
      if constexpr (kTaps == 3) {
        if (square)
          return border ? channels(constant<1>{}, constant<1>{}) : channels(constant<1>{}, constant<kAtBorder>{});
      }
      border ? channels(constant<0>{}, constant<1>{}) : channels(constant<0>{}, constant<kAtBorder>{});
    });
  }
  if (c.stream) finish_streaming();
}

// Any taps: four outputs of a row share a weight, and load their own pixels.
template <class T, int kCols>
inline void conv_any_tile(const Conv<acc_t<T>>& c, int row, int col, ptrdiff_t at, const acc_t<T>* w,
                          const acc_t<T>* init, T* out) {
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
          const int packed = b * kBlock<acc_t<T>> + v;
          const ptrdiff_t at = b + 1 < c.blocks ? packed : c.last + v;
          conv_any_tile<T, cols.value>(c, row, col, at, c.weights + b * c.weights_step + v,
                                       c.init ? c.init + packed : nullptr, out + at);
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
