// Matrix products of a tile with weights in panels, and what is done to a panel of results.  Part of kernels.cpp,
// inside its namespace.
//
// Cost model: a step of the inner loop makes kRows x kPanels * kBlock multiply-adds of kRows numbers of a, broadcast,
// and one line of each panel of b.  With AVX2 that is 6 x 16: 12 multiply-adds, six cycles, beside 8 loads; with
// AVX-512 14 x 32: 28 multiply-adds, 14 cycles, beside 16 loads.  kDepth steps of a panel stay in the first-level cache
// while all rows of a go past them; a comes out of the second level, four bytes for kBlock multiply-adds.

template <class A>
constexpr int kVectors = kBlock<A> / kLanes<A>;  // of a panel's line

template <class A, bool kTransposed>
struct GemmTile {
  static constexpr int kPanels = kVectorBytes < 64 ? 1 : kTransposed ? 3 : 2, kSums = kPanels * kVectors<A>;
  static constexpr int kMost = (kRegisters - kSums - 1) / kSums;
  static constexpr int kRows = kTransposed && kMost >= kBlock<A> / 2 ? kBlock<A> / 2 : kMost;
  static constexpr int kDepth = 128;
};

inline void ask(Ahead*& ahead, const Ahead* end, int lines) {
  for (; lines > 0 && ahead != end; --lines) {
    if (ahead->rows == 0) {
      ++ahead;
      continue;
    }
    __builtin_prefetch(ahead->at + ahead->line * 64, 0, 2);
    if (++ahead->line < ahead->lines) continue;
    ahead->line = 0;
    ahead->at += ahead->row;
    --ahead->rows;
  }
}

// c[m][panel][n] (+)= sum over k in [0, depth) of a(m, k) * b[panel][k][n] for kRows rows.
template <class A, bool kTransposed, int kRows, int kPanels>
inline void gemm_tile(Gemm<A>& g, const A* a, const A* b, A* c, int depth, bool add) {
  constexpr int L = kLanes<A>, V = kVectors<A>, B = kBlock<A>;
  constexpr int kMiddle = kTransposed ? 0 : kRows / 2 * B;  // short offsets reach both ways
  vec<A, L> acc[kRows][kPanels * V] = {};
  if (add) {
    for (int m = 0; m < kRows; ++m) {
      for (int p = 0; p < kPanels; ++p) __builtin_prefetch(c + m * B + p * g.c_panel, 1);
    }
  }
  const ptrdiff_t b_panel = g.b_panel * sizeof(A);
  for (int k = 0; k < depth; k += B, a += kTransposed ? B * B : g.a_panel) {
    const A* at = a + kMiddle;
    const int steps = depth - k < B ? depth - k : B;
    ask(g.ahead, g.ahead_end, g.ahead_lines);
    for (int i = 0; i < steps; ++i) {
      vec<A, L> line[kPanels * V];
#pragma GCC unroll 4
      for (int v = 0; v < kPanels * V; ++v) line[v] = in_register(load<L>(bytes_on(b, v / V * b_panel) + v % V * L));
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m) {
        const vec<A, L> value = broadcast<L>(at[kTransposed ? m : m * B - kMiddle]);
#pragma GCC unroll 4
        for (int v = 0; v < kPanels * V; ++v) acc[m][v] += value * line[v];
      }
      b += B;
      at += kTransposed ? B : 1;
      keep_pointer(b);
      keep_pointer(at);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < kPanels * V; ++v) {
      A* dst = c + m * B + v / V * g.c_panel + v % V * L;
      store<L>(dst, add ? load<L>(dst) + acc[m][v] : acc[m][v]);
    }
  }
}

// Rows in tiles of about the same height.
template <class A, bool kTransposed, int kPanels, int kRows = GemmTile<A, kTransposed>::kRows>
inline void gemm_rows(Gemm<A>& g, const A* a, const A* b, A* c, int depth, bool add, int rows) {
  if constexpr (kRows > 0) {
    if (rows < kRows) return gemm_rows<A, kTransposed, kPanels, kRows - 1>(g, a, b, c, depth, add, rows);
    gemm_tile<A, kTransposed, kRows, kPanels>(g, a, b, c, depth, add);
  }
}

template <class A, bool kTransposed, int kPanels>
inline void gemm_panels(Gemm<A>& g, int panel) {
  constexpr int B = kBlock<A>;
  constexpr int kRows = GemmTile<A, kTransposed>::kRows, kDepth = GemmTile<A, kTransposed>::kDepth;
  const int tiles = (g.rows + kRows - 1) / kRows;
  const auto at_most = [](int depth) { return depth < kDepth ? depth : kDepth; };
  for (int k = 0; k < g.depth; k += kDepth) {
    const int depth = at_most(g.depth - k);
    // What of b comes next: the rest of these panels, or other panels, or nothing.
    const A* next = g.b + panel * g.b_panel + (k + depth) * B;
    int lines = at_most(g.depth - k - depth);
    if (lines == 0 && panel + 2 * kPanels <= g.panels) {
      next = g.b + (panel + kPanels) * g.b_panel;
      lines = at_most(g.depth);
    }
    const A* b = g.b + panel * g.b_panel + k * B;
    A* c = g.c + panel * g.c_panel;
    const bool add = g.add || k > 0;
    const auto fetch = [&](int i, int n) {
      for (int l = lines * i / n; l < lines * (i + 1) / n; ++l) {
        for (int p = 0; p < kPanels; ++p) __builtin_prefetch(next + p * g.b_panel + l * B, 0, 2);
      }
    };
    if (kTransposed) {
      const int blocks = (g.rows + B - 1) / B;
      for (int i = 0; i < blocks; ++i) {
        fetch(i, blocks);
        const int rows = g.rows - i * B < B ? g.rows - i * B : B, tiles = (rows + kRows - 1) / kRows;
        for (int t = 0; t < tiles; ++t) {
          const int m = rows * t / tiles, end = rows * (t + 1) / tiles;
          gemm_rows<A, kTransposed, kPanels>(g, g.a + i * g.a_panel + k * B + m, b, c + (i * B + m) * B, depth, add, end - m);
        }
      }
    } else {
      for (int i = 0; i < tiles; ++i) {
        fetch(i, tiles);
        const int m = static_cast<int>(static_cast<long long>(g.rows) * i / tiles);
        const int end = static_cast<int>(static_cast<long long>(g.rows) * (i + 1) / tiles);
        gemm_rows<A, kTransposed, kPanels>(g, g.a + m * B + k / B * g.a_panel, b, c + m * B, depth, add, end - m);
      }
    }
  }
}

template <class A, bool kTransposed>
inline void gemm_as(Gemm<A>& g) {
  typedef GemmTile<A, kTransposed> Tile;
  // Lines asked for beside each kBlock steps of a tile's depth.
  const auto pieces = [](int count, int each) { return static_cast<long long>((count + each - 1) / each); };
  const long long steps = pieces(g.rows, Tile::kRows) * pieces(g.depth, kBlock<A>) * pieces(g.panels, Tile::kPanels);
  g.ahead_lines = static_cast<int>((g.ahead_lines + steps - 1) / steps);
  constexpr int kPanels = GemmTile<A, kTransposed>::kPanels;
  int panel = 0;
  for (; panel + kPanels <= g.panels; panel += kPanels) gemm_panels<A, kTransposed, kPanels>(g, panel);
  if constexpr (kPanels > 2) {
    if (panel + 2 <= g.panels) gemm_panels<A, kTransposed, 2>(g, panel), panel += 2;
  }
  if constexpr (kPanels > 1) {
    if (panel < g.panels) gemm_panels<A, kTransposed, 1>(g, panel);
  }
}

template <class A>
void gemm(const Gemm<A>& args) {
  Gemm<A> g = args;  // a copy, which no store through a pointer can be thought to change
  g.transposed ? gemm_as<A, true>(g) : gemm_as<A, false>(g);
}

template <int L, class A>
inline vec<A, L> clamped(vec<A, L> v, A low, A high) {
  v = v < low ? broadcast<L>(low) : v;  // NaN stays
  return v > high ? broadcast<L>(high) : v;
}

// Of a panel: its numbers as T has them, and the mean and the sum of squared deviations of each lane.  Deviations are
// summed about the mean as it comes out first: what they sum to is the correction of its rounding.  Chan's merge, in
// double.
template <class T>
void finish(const Finish<acc_t<T>>& f) {
  typedef acc_t<T> A;
  constexpr int L = kLanes<A>, B = kBlock<A>, kStretch = 16;
  for (int v = 0; v < B; v += L) {
    vec<A, L> sum = {}, bias = {};
    if (f.bias) bias = load<L>(f.bias + v);
    for (int i = 0; i < f.rows; ++i) {
      A* at = f.panel + i * B + v;
      vec<A, L> value = clamped<L, A>(load<L>(at) + bias, f.low, f.high);
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
    const auto wide = [](vec<A, L> a) { return __builtin_convertvector(a, vec<double, L>); };
    const double part = f.rows / (f.count + f.rows);
    const vec<double, L> delta = wide(mean) + wide(correction) - load<L>(f.mean + v);
    const vec<double, L> m2 = wide(squares - total * correction) + delta * delta * (f.count * part);
    store<L>(f.mean + v, load<L>(f.mean + v) + delta * part);
    store<L>(f.m2 + v, load<L>(f.m2 + v) + m2);
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

// ReLU of v, and zeros in dv where it gives zero; whole vectors.
template <class A>
void relu_with_gradient(A* v, A* dv, ptrdiff_t count) {
  constexpr int L = kLanes<A>;
  for (ptrdiff_t i = 0; i < count; i += L) {
    const vec<A, L> value = load<L>(v + i);
    store<L>(dv + i, value <= A{0} ? vec<A, L>{} : load<L>(dv + i));
    store<L>(v + i, relu<L, A>(value));
  }
}
