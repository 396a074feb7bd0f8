// Matrix products of a tile with weights in panels, and what is done to a panel of results.  Part of kernels.cpp,
// inside its namespace.
//
// Cost model: a step of the inner loop makes kRows x kPanels * kBlock multiply-adds of kRows numbers of a, broadcast,
// and one line of each panel of b.  With AVX2 that is 6 x 16: 12 multiply-adds, six cycles, beside 8 loads; with
// AVX-512 14 x 32: 28 multiply-adds, 14 cycles, beside 16 loads, or, of a transposed a, 8 x 48: 24 multiply-adds, 12
// cycles, beside 11 loads.  kDepth steps of a panel stay in the first-level cache while all rows of a go past them; a
// comes out of the second level, four bytes for kBlock multiply-adds, and lines that follow each other.

template <class A>
constexpr int kVectors = kBlock<A> / kLanes<A>;  // of a panel's line

// Rows of a transposed a are neighbours in blocks of kBlock, which tiles do not cross: halves of them, if registers
// allow.
template <class A, bool kTransposed>
struct GemmTile {
  static constexpr int kPanels = kVectorBytes < 64 ? 1 : kTransposed ? 3 : 2, kSums = kPanels * kVectors<A>;
  static constexpr int kMost = (kRegisters - kSums - 1) / kSums, kHalf = kBlock<A> / 2;
  static constexpr int kRows = kTransposed && kMost > kHalf ? kHalf : kMost;
  static constexpr int kDepth = 128;
};

// c[m][panel][n] (+)= sum over k in [0, depth) of a(m, k) * b[panel][k][n] for kRows rows.
template <class A, bool kTransposed, int kRows, int kPanels>
inline void gemm_tile(const Gemm<A>& g, const A* a, const A* b, A* c, int depth, bool add) {
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
#pragma GCC unroll 2  // what counts steps takes the multiply-adds' ports
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

template <class A, bool kTransposed, int kPanels, int kRows = GemmTile<A, kTransposed>::kRows>
inline void gemm_rows(const Gemm<A>& g, const A* a, const A* b, A* c, int depth, bool add, int rows) {
  if constexpr (kRows > 0) {
    if (rows < kRows) return gemm_rows<A, kTransposed, kPanels, kRows - 1>(g, a, b, c, depth, add, rows);
    gemm_tile<A, kTransposed, kRows, kPanels>(g, a, b, c, depth, add);
  }
}

template <class A, bool kTransposed, int kPanels>
inline void gemm_panels(const Gemm<A>& g, int panel) {
  constexpr int B = kBlock<A>;
  constexpr int kRows = GemmTile<A, kTransposed>::kRows, kDepth = GemmTile<A, kTransposed>::kDepth;
  // Groups of rows, each of which is cut into tiles of about the same height.
  const int groups = kTransposed ? (g.rows + B - 1) / B : 1, group = kTransposed ? B : g.rows;
  const auto tiles_of = [](int rows) { return (rows + kRows - 1) / kRows; };
  const auto at_most = [](int depth) { return depth < kDepth ? depth : kDepth; };
  for (int k = 0; k < g.depth; k += kDepth) {
    const int depth = at_most(g.depth - k);
    // What of b comes next, the rest of this panel or the next one, is asked for in advance, some lines before each
    // tile.  Where tiles read several panels, or many lines of c, hardware does better if left alone.
    const A* next = g.b + panel * g.b_panel + (k + depth) * B;
    int lines = 0, some = 0;
    if constexpr (kVectorBytes < 64 && !kTransposed) {
      lines = at_most(g.depth - k - depth);
      if (lines == 0 && panel + 1 < g.panels) next = g.b + (panel + 1) * g.b_panel, lines = at_most(g.depth);
      some = lines / tiles_of(group) + 1;
    }
    const A* b = g.b + panel * g.b_panel + k * B;
    A* c = g.c + panel * g.c_panel;
    for (int i = 0; i < groups; ++i) {
      const int rows = g.rows - i * group < group ? g.rows - i * group : group, tiles = tiles_of(rows);
      const A* a = g.a + (kTransposed ? i * g.a_panel + k * B : k / B * g.a_panel);
      for (int t = 0; t < tiles; ++t) {
        for (int l = 0; l < some && lines > 0; ++l, --lines, next += B) __builtin_prefetch(next, 0, 2);
        const int height = rows / tiles + (t < rows % tiles);
        gemm_rows<A, kTransposed, kPanels>(g, a, b, c, depth, g.add || k > 0, height);
        a += kTransposed ? height : height * B;
        c += height * B;
      }
    }
  }
}

// As many panels at a time as a tile has, then what is left.
template <class A, bool kTransposed, int kPanels = GemmTile<A, kTransposed>::kPanels>
inline void gemm_as(const Gemm<A>& g, int panel = 0) {
  for (; panel + kPanels <= g.panels; panel += kPanels) gemm_panels<A, kTransposed, kPanels>(g, panel);
  if constexpr (kPanels > 1) gemm_as<A, kTransposed, kPanels - 1>(g, panel);
}

template <class A>
void gemm(const Gemm<A>& args) {
  const Gemm<A> g = args;  // a copy, which no store through a pointer can be thought to change
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
