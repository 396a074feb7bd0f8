// Matrix products of a tile with weights in panels, and what is done to a panel of results.  Part of kernels.cpp,
// inside its namespace.
//
// Cost model: a step of the inner loop makes kRows x kPanels * kBlock multiply-adds of kRows numbers of a, broadcast,
// and one line of each panel of b.  With AVX2 that is 6 x 16: 12 multiply-adds, six cycles, beside 8 loads; with
// AVX-512 14 x 32: 28 multiply-adds, 14 cycles, beside 16 loads.  kDepth steps of a panel stay in the first-level cache
// while all rows of a go past them; a comes out of the second level, four bytes for kBlock multiply-adds.

template <class A>
constexpr int kVectors = kBlock<A> / kLanes<A>;  // of a panel's line

template <class A>
struct GemmTile {
  static constexpr int kPanels = kVectorBytes == 64 ? 2 : 1, kSums = kPanels * kVectors<A>;
  static constexpr int kRows = kVectorBytes == 64 ? 14 : (kRegisters - kSums - 1) / kSums;
  static constexpr int kDepth = 128;
};

// c[m][panel][n] (+)= sum over k in [k_begin, k_end) of a(m, k) * b[panel][k][n] for kRows rows.
template <class A, int kRows, int kPanels>
inline void gemm_tile(const Gemm<A>& g, const A* a, const A* b, A* c, int depth, bool add) {
  constexpr int L = kLanes<A>, V = kVectors<A>, B = kBlock<A>;
  constexpr int kTriples = (kRows + 2) / 3;  // of rows: an addressing mode reaches three from one pointer
  const ptrdiff_t a_row = g.a_row * sizeof(A), a_step = g.a_step * sizeof(A);
  vec<A, L> acc[kRows][kPanels * V] = {};
  if (add) {
    for (int m = 0; m < kRows; ++m) {
      for (int p = 0; p < kPanels; ++p) __builtin_prefetch(c + m * g.c_row + p * g.c_panel, 1);
    }
  }
  for (int k = 0; k < depth; k += B, a += g.a_block) {
    const A* triple[kTriples];
#pragma GCC unroll 8
    for (int t = 0; t < kTriples; ++t) triple[t] = a + 3 * t * g.a_row;
    const int steps = depth - k < B ? depth - k : B;
    for (int i = 0; i < steps; ++i, b += B) {
      vec<A, L> line[kPanels * V];
#pragma GCC unroll 4
      for (int v = 0; v < kPanels * V; ++v) line[v] = in_register(load<L>(b + v / V * g.b_panel + v % V * L));
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m) {
        const vec<A, L> value = broadcast<L>(*bytes_on(triple[m / 3], m % 3 * a_row));
#pragma GCC unroll 4
        for (int v = 0; v < kPanels * V; ++v) acc[m][v] += value * line[v];
      }
#pragma GCC unroll 8
      for (int t = 0; t < kTriples; ++t) {
        triple[t] = bytes_on(triple[t], a_step);
        keep_pointer(triple[t]);
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < kPanels * V; ++v) {
      A* dst = c + m * g.c_row + v / V * g.c_panel + v % V * L;
      store<L>(dst, add ? load<L>(dst) + acc[m][v] : acc[m][v]);
    }
  }
}

// Rows in tiles of about the same height.
template <class A, int kPanels, int kRows = GemmTile<A>::kRows>
inline void gemm_rows(const Gemm<A>& g, const A* a, const A* b, A* c, int depth, bool add, int rows) {
  if constexpr (kRows > 0) {
    if (rows < kRows) return gemm_rows<A, kPanels, kRows - 1>(g, a, b, c, depth, add, rows);
    gemm_tile<A, kRows, kPanels>(g, a, b, c, depth, add);
  }
}

template <class A, int kPanels>
inline void gemm_panels(const Gemm<A>& g, int panel) {
  constexpr int kRows = GemmTile<A>::kRows, kDepth = GemmTile<A>::kDepth;
  const int tiles = (g.rows + kRows - 1) / kRows;
  const auto at_most = [](int depth) { return depth < kDepth ? depth : kDepth; };
  for (int k = 0; k < g.depth; k += kDepth) {
    const int depth = at_most(g.depth - k);
    // What of b comes next: the rest of these panels, or other panels, or nothing.
    const A* next = g.b + panel * g.b_panel + (k + depth) * kBlock<A>;
    int lines = at_most(g.depth - k - depth);
    if (lines == 0 && panel + 2 * kPanels <= g.panels) {
      next = g.b + (panel + kPanels) * g.b_panel;
      lines = at_most(g.depth);
    }
    for (int i = 0; i < tiles; ++i) {
      const int m = static_cast<int>(static_cast<long long>(g.rows) * i / tiles);
      const int end = static_cast<int>(static_cast<long long>(g.rows) * (i + 1) / tiles);
      // It is asked for in advance, some lines before each tile.
      for (int l = lines * i / tiles; l < lines * (i + 1) / tiles; ++l) {
        for (int p = 0; p < kPanels; ++p) __builtin_prefetch(next + p * g.b_panel + l * kBlock<A>, 0, 2);
      }
      gemm_rows<A, kPanels>(g, g.a + m * g.a_row + k / kBlock<A> * g.a_block, g.b + panel * g.b_panel + k * kBlock<A>,
                            g.c + m * g.c_row + panel * g.c_panel, depth, g.add || k > 0, end - m);
    }
  }
}

template <class A>
void gemm(const Gemm<A>& args) {
  const Gemm<A> g = args;  // a copy, which no store through a pointer can be thought to change
  constexpr int kPanels = GemmTile<A>::kPanels;
  int panel = 0;
  for (; panel + kPanels <= g.panels; panel += kPanels) gemm_panels<A, kPanels>(g, panel);
  if constexpr (kPanels > 1) {
    if (panel < g.panels) gemm_panels<A, 1>(g, panel);
  }
}

template <int L, class A>
inline vec<A, L> clamped(vec<A, L> v, A low, A high) {
  v = v < low ? broadcast<L>(low) : v;  // NaN stays
  return v > high ? broadcast<L>(high) : v;
}

// Of a panel: its numbers as T has them, and the mean and the sum of squared deviations of each lane.  Deviations are
// summed about the mean as it comes out first: what they sum to is the correction of its rounding.
template <class T>
void finish(const Finish<acc_t<T>>& f) {
  typedef acc_t<T> A;
  constexpr int L = kLanes<A>, B = kBlock<A>, kStretch = 16;
  for (int v = 0; v < B; v += L) {
    vec<A, L> sum = {}, bias = {};
    if (f.bias) bias = load<L>(f.bias + v);
    for (int i = 0; i < f.rows; ++i) {
      A* at = f.panel + i * B + v;
      vec<A, L> value = load<L>(at) + bias;
      if (f.residual) value += load<L>(f.residual + i * B + v);
      value = clamped<L, A>(value, f.low, f.high);
      if constexpr (sizeof(T) < 4) {
        T rounded[L];
        store<L>(rounded, value);
        value = load<L>(rounded);
      }
      store<L>(at, value);
      sum += value;
    }
    if (!f.mean) continue;
    const vec<A, L> mean = sum / static_cast<A>(f.rows);
    vec<A, L> total = {}, squares = {};
    // In short sums first: numbers of few digits are rounded alike, and long sums of them in one direction.
    for (int first = 0; first < f.rows; first += kStretch) {
      const int end = first + kStretch < f.rows ? first + kStretch : f.rows;
      vec<A, L> some = {}, some_squares = {};
      for (int i = first; i < end; ++i) {
        const vec<A, L> deviation = load<L>(f.panel + i * B + v) - mean;
        some += deviation;
        some_squares += deviation * deviation;
      }
      total += some;
      squares += some_squares;
    }
    const vec<A, L> correction = total / static_cast<A>(f.rows);
    store<L>(f.mean + v, mean);
    store<L>(f.correction + v, correction);
    store<L>(f.m2 + v, squares - total * correction);
  }
}

template <class A>
void add(const A* from, A* to, ptrdiff_t count) {
  constexpr int L = kLanes<A>;
  for_lanes<L>(static_cast<int>(count), [&](auto l, int i) {
    constexpr int n = l.value;
    store<n>(to + i, load<n>(to + i) + load<n>(from + i));
  });
}

template <class A>
void clamp(A* p, ptrdiff_t count, A low, A high) {
  constexpr int L = kLanes<A>;
  for_lanes<L>(static_cast<int>(count), [&](auto l, int i) {
    constexpr int n = l.value;
    store<n>(p + i, clamped<n, A>(load<n>(p + i), low, high));
  });
}

// ReLU of v, and zeros in dv where it gives zero: both as [pixels] of `lanes` numbers, `pixel` apart.
template <class A>
void relu_with_gradient(A* v, A* dv, int pixels, ptrdiff_t pixel, int lanes) {
  constexpr int L = kLanes<A>;
  for (int i = 0; i < pixels; ++i, v += pixel, dv += pixel) {
    for (int c = 0; c < lanes; c += L) {
      const vec<A, L> value = load<L>(v + c);
      store<L>(dv + c, value <= A{0} ? vec<A, L>{} : load<L>(dv + c));
      store<L>(v + c, relu<L, A>(value));
    }
  }
}
