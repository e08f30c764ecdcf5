// CM logits on the pixel grid: every logit is read once and every gradient written once.
//
// A tile of pixels goes through three steps, with the exponentials of its C x C logits kept in cache (`field_`)
// meanwhile:
//   1. softmax of the class logits; for each column j: load, shift by the column maximum, exponentiate, sum (Z, q)
//   2. per pixel: D, posterior, loss, and the three coefficients of each column's gradient (coarse_math.h)
//   3. for each column j: exponentials * coefficients, streamed to memory
//
// Memory is the limit (2 C x C x 4 bytes a pixel), arithmetic comes second (C x C exponentials), so one loop keeps both
// busy (`pipeline`): for column j it exponentiates this tile's logits, streams out the gradient of the tile before from
// the slots that they go to, and fetches the logits of column j + 1. In separate loops reading, computing and writing
// wait for one another, which takes 1.3 times as long (C = 19).
#pragma once

#include "common.h"

namespace coarse {
namespace {

constexpr int64_t kTileBytes = 384 * 1024;  // of E: most of a 1 MB second-level cache is left to streams in flight
constexpr int64_t kMaxTile = 256;           // pixels: a run of 1 KB in each of the C x C planes

constexpr int kUnroll = 2;  // vectors of a plane that are worked on together

template <class R>
inline int64_t tile_pixels(int classes) {
  constexpr int64_t kStep = kUnroll * kLanes<R>;
  const int64_t fit = kTileBytes / (static_cast<int64_t>(classes) * classes * static_cast<int64_t>(sizeof(R)));
  const int64_t tile = fit < kMaxTile ? fit / kStep * kStep : kMaxTile;
  return tile < kStep ? kStep : tile;
}

template <class R, int kClasses>
class PixelGrid {
  using V = Vec<R>;
  static constexpr int N = kLanes<R>;

 public:
  PixelGrid(const Stream<R>& s, void* workspace) : s_(s), arena_(workspace), tile_(tile_pixels<R>(s.classes)) {
    const int64_t c = s.classes, t = tile_;
    want_cm_ = s.cm_gradient != nullptr;
    keep_field_ = want_cm_ || s.transition_gradient != nullptr;
    accumulate_ = s.cm_batch == 1 && s.batch > 1;
    constexpr Storage own = sizeof(R) == 4 ? Storage::f32 : Storage::f64;
    own_storage_ = s.cm_storage == own;
    own_gradient_ = s.cm_gradient_storage == own;
    aligned_planes_ = reinterpret_cast<uintptr_t>(s.cm_gradient) % sizeof(V) == 0 && s.pixels() % (kUnroll * N) == 0;
    field_ = arena_.take<R>(c * t * (keep_field_ ? c : 1));
    for (R*& reported : reported_) reported = arena_.take<R>(t * (one_hot() ? 1 : c));
    p_ = arena_.take<R>(c * t);
    q_ = arena_.take<R>(c * t);
    inv_z_ = arena_.take<R>(c * t);
    ajj_ = arena_.take<R>(c * t);
    keep_ = arena_.take<R>(c * t);
    drop_ = arena_.take<R>(c * t);
    diag_ = arena_.take<R>(c * t);
    row_ = arena_.take<R>(t);
    staged_ = arena_.take<R>(c * t);
    top_ = arena_.take<V>(t / N);
    labels_.take(arena_, t);
    slow_.take(arena_, c);
  }

  int64_t workspace_bytes() const { return arena_.used(); }

  void run(int64_t task, int64_t b, int64_t begin, int64_t end) {
    task_ = task;
    Tile pending{};
    int which = 0;
    for (int64_t x = begin; x < end; x += tile_) {
      const int64_t n = end - x < tile_ ? end - x : tile_;
      const int64_t b0 = accumulate_ ? 0 : b, b1 = accumulate_ ? s_.batch : b + 1;
      for (int64_t image = b0; image < b1; ++image) {
        const Tile tile{true, false, image, x, n, round_up(n, kUnroll * N), reported_[which]};
        pending = step(tile, pending);
        which ^= 1;
      }
    }
    for (int j = 0; j < classes(); ++j) write_column(j, pending);
    stream_fence();
  }

 private:
  struct Tile {
    bool active, zero;
    int64_t image, x, n, padded;
    R* reported;  // (C, tile) T[i, y]; of positive drawings (tile) the labels themselves, as numbers
  };

  int classes() const { return kClasses > 0 ? kClasses : s_.classes; }
  bool one_hot() const { return s_.transition == nullptr; }
  R* column(int i, int j) const { return field_ + (keep_field_ ? static_cast<int64_t>(i) * classes() + j : i) * tile_; }
  int64_t plane(const Tile& t, int64_t index) const { return index * s_.pixels() + t.x; }

  // Steps 1 and 2 of `tile`, with step 3 of `pending` between its columns. Returns what is to be written next.
  Tile step(Tile tile, const Tile& pending) {
    labels_.any_valid = false;
    labels_.all_valid = true;
    const int64_t at = tile.image * s_.pixels() + tile.x;
    if (labels_.read(s_, at, tile.n, tile.padded, 0)) s_.bad_label[task_] = 1;
    if (!labels_.any_valid && s_.posterior == nullptr) {
      for (int j = 0; j < classes(); ++j) write_column(j, pending);
      tile.zero = true;
      zero_outputs(tile, at);
      return tile;
    }
    if (one_hot()) {
      for (int64_t k = 0; k < tile.padded; ++k) tile.reported[k] = static_cast<R>(labels_.label[k]);
    } else {
      report_run(s_.transition, classes(), labels_.label, tile.padded, tile.reported, tile_);
    }
    softmax(tile);
    const bool whole = tile.n == tile.padded;
    const bool together =
        whole && pending.active && !pending.zero && pending.n == tile.n && want_cm_ && !accumulate_ && aligned_planes_;
    for (int j = 0; j < classes(); ++j) {
      if (!together) write_column(j, pending);
      stage_column(j, tile);
      const Tile* leaving = together ? &pending : nullptr;
      one_hot() ? pipeline<true>(j, tile, leaving) : pipeline<false>(j, tile, leaving);
    }
    finish(tile, at);
    return tile;
  }

  void softmax(const Tile& t) {
    const int c = classes();
    for (int j = 0; j < c; ++j) {
      R* p = p_ + j * tile_;
      load_run(s_.seg_logits, s_.seg_storage, plane(t, t.image * c + j), t.n, p);
      for (int64_t k = t.n; k < t.padded; ++k) p[k] = R(0);
      if (!labels_.all_valid && s_.posterior == nullptr) mask(p, t);
    }
    for (int64_t k = 0; k < t.padded; k += N) {
      V top = load(p_ + k);
      for (int j = 1; j < c; ++j) top = max_v(load(p_ + j * tile_ + k), top);
      V sum = broadcast<V>(R(0));
      for (int j = 0; j < c; ++j) {
        const V e = exp_v(load(p_ + j * tile_ + k) - top);
        store(p_ + j * tile_ + k, e);
        sum += e;
      }
      const V inv = R(1) / sum;
      for (int j = 0; j < c; ++j) store(p_ + j * tile_ + k, load(p_ + j * tile_ + k) * inv);
    }
  }

  // Logits that nobody labelled may be anything, NaN too: they count as 0.
  void mask(R* run, const Tile& t) const {
    for (int64_t k = 0; k < t.padded; k += N) {
      const V valid = load(labels_.valid + k);
      store(run + k, select(valid != broadcast<V>(R(0)), load(run + k), broadcast<V>(R(0))));
    }
  }

  int64_t cm_offset(const Tile& t, int i, int j) const {
    return t.image * s_.cm_batch_stride + plane(t, static_cast<int64_t>(i) * classes() + j);
  }

  // The logits of column j, and their maximum over i.
  void stage_column(int j, const Tile& t) {
    R* const staged = staged_;
    V* const top = top_;
    const bool direct = own_storage_ && t.n == t.padded, masked = !labels_.all_valid;
    const R* const valid = labels_.valid;
    const V zero = broadcast<V>(R(0));
    for (int64_t k = 0; k < t.padded; k += N) top[k / N] = broadcast<V>(-std::numeric_limits<R>::infinity());
    for (int i = 0; i < classes(); ++i) {
      R* const run = staged + i * tile_;
      const int64_t offset = cm_offset(t, i, j);
      if (direct) {
        const R* const logits = static_cast<const R*>(s_.cm_logits) + offset;
        for (int64_t k = 0, n = t.n; k < n; k += N) {
          V x = load(logits + k);
          if (masked) x = select(load(valid + k) != zero, x, zero);
          store(run + k, x);
          top[k / N] = max_v(x, top[k / N]);
        }
        continue;
      }
      load_run(s_.cm_logits, s_.cm_storage, offset, t.n, run);
      for (int64_t k = t.n; k < t.padded; ++k) run[k] = R(0);
      if (masked) mask(run, t);
      for (int64_t k = 0; k < t.padded; k += N) top[k / N] = max_v(load(run + k), top[k / N]);
    }
  }

  // Column j of tile t: exponentials of the staged logits, and their sums over i; with `pending`, the gradient of that
  // tile leaves the slots first. kOneHot: T is the identity, so T[i, y] is a comparison. A few vectors of a plane at a
  // time, so that all sums and coefficients stay in registers. Meanwhile the next column is fetched, in runs of a tile:
  // DRAM serves whole kilobytes of a plane twice as fast as lines of one plane after the other.
  template <bool kOneHot>
  void pipeline(int j, const Tile& t, const Tile* pending) {
    const int c = classes();
    const int64_t tile = tile_, slot_stride = (keep_field_ ? c : 1) * tile_, plane_stride = c * s_.pixels();
    const R* const staged = staged_;
    const V *const top = top_, zero = broadcast<V>(R(0));
    R* const slots = column(0, j);
    const int64_t column_at = j * tile;
    const bool emit = pending != nullptr;
    const int64_t leaving_at = emit ? gradient_offset(0, j, *pending) : 0;
    const R* const leaving_reported = emit ? pending->reported : nullptr;

    // The next column's lines, in order. After the last column: the first of the next tile (a prefetch may miss the
    // end).
    const int64_t element = s_.cm_storage == Storage::f64 ? 8 : s_.cm_storage == Storage::f32 ? 4 : 2;
    const bool last = j + 1 == c;
    const char* line =
        static_cast<const char*>(s_.cm_logits) + element * (cm_offset(t, 0, last ? 0 : j + 1) + (last ? tile : 0));
    const int64_t run_bytes = element * tile, run_step = element * plane_stride - run_bytes;
    const int lines = static_cast<int>(kUnroll * N * element / 64);
    int64_t left = run_bytes;

    for (int64_t k = 0; k < t.padded; k += kUnroll * N) {
      V z[kUnroll], q[kUnroll], shift[kUnroll], label[kUnroll], keep[kUnroll], drop[kUnroll], leaving_label[kUnroll];
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t at = k + u * N;
        z[u] = q[u] = zero;
        shift[u] = top[at / N];
        label[u] = load(t.reported + at);
        keep[u] = load(keep_ + column_at + at);
        drop[u] = load(drop_ + column_at + at);
        leaving_label[u] = emit ? load(leaving_reported + at) : zero;
      }
      for (int i = 0; i < c; ++i) {
        R* const slot = slots + i * slot_stride + k;
        const V observed = broadcast<V>(static_cast<R>(i));
        for (int u = 0; u < lines; ++u) __builtin_prefetch(line + 64 * u, 0, 2);
        line += 64 * lines;
        left -= 64 * lines;
        if (left <= 0) {
          line += run_step;
          left = run_bytes;
        }
        if (emit) {
          V g[kUnroll];
          for (int u = 0; u < kUnroll; ++u) {
            V factor;
            if constexpr (kOneHot) {
              factor = select(leaving_label[u] == observed, keep[u] - drop[u], keep[u]);
            } else {
              factor = keep[u] - load(leaving_reported + i * tile + k + u * N) * drop[u];
            }
            g[u] = load(slot + u * N) * factor;
            if (i == j) g[u] += load(diag_ + column_at + k + u * N);
          }
          stream_vectors(g, leaving_at + i * plane_stride + k);
        }
        for (int u = 0; u < kUnroll; ++u) {
          const V e = exp_v(load(staged + i * tile + k + u * N) - shift[u]);
          store(slot + u * N, e);
          z[u] += e;
          if constexpr (kOneHot) {
            q[u] += select(label[u] == observed, e, zero);
          } else {
            q[u] += e * load(t.reported + i * tile + k + u * N);
          }
        }
      }
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t at = column_at + k + u * N;
        const V inv_z = R(1) / z[u];
        store(inv_z_ + at, inv_z);
        store(q_ + at, q[u] * inv_z);
        store(ajj_ + at, load(slots + j * slot_stride + k + u * N) * inv_z);
      }
    }
  }

  void finish(const Tile& t, int64_t at) {
    const int c = classes();
    V sum_nll = broadcast<V>(R(0)), sum_trace = broadcast<V>(R(0));
    const V zero = broadcast<V>(R(0));
    for (int64_t k = 0; k < t.padded; k += N) {
      V d = zero, trace = zero;
      for (int j = 0; j < c; ++j) {
        d += load(p_ + j * tile_ + k) * load(q_ + j * tile_ + k);
        trace += load(ajj_ + j * tile_ + k);
      }
      const V weight = load(labels_.weight + k);
      const V scaled = weight * s_.gradient_scale, scaled_trace = scaled * s_.trace_weight;
      V nll;
      if (any(!(d >= broadcast<V>(kSmallestEvidence<R>)))) {
        const PixelTerms<V> terms = log_space(t, k, scaled, scaled_trace);
        nll = terms.nll;
        trace = terms.trace;
      } else {
        nll = -log_v(d);
        const V inv_d = R(1) / d;
        if (s_.transition_gradient != nullptr) add_transition_gradient(k, scaled * inv_d);
        for (int j = 0; j < c; ++j) {
          const int64_t slot = j * tile_ + k;
          const V p = load(p_ + slot), r = p * load(q_ + slot) * inv_d;
          const auto g = column_gradient(p, r, inv_d, load(inv_z_ + slot), load(ajj_ + slot), scaled, scaled_trace);
          store(keep_ + slot, g.keep);
          store(drop_ + slot, g.drop);
          store(diag_ + slot, g.diag);
          store(p_ + slot, s_.posterior == nullptr ? scaled * (p - r) : p);
          store(q_ + slot, r);
        }
      }
      nll = select(weight == zero, zero, weight * nll);  // 0 * inf is not 0
      trace = select(weight == zero, zero, weight * trace);
      sum_nll += nll;
      sum_trace += trace;
      store_pixels(s_.nll_map, nll, at + k, t.n - k);
      store_pixels(s_.trace_map, trace, at + k, t.n - k);
    }
    s_.sums[2 * task_] += sum_lanes<R>(sum_nll);
    s_.sums[2 * task_ + 1] += sum_lanes<R>(sum_trace);
    for (int j = 0; j < c; ++j) {
      const int64_t offset = plane(t, t.image * c + j);
      if (s_.seg_gradient != nullptr) store_run(s_.seg_gradient, s_.seg_storage, offset, t.n, p_ + j * tile_);
      if (s_.posterior == nullptr) continue;
      const R *p = p_ + j * tile_, *r = q_ + j * tile_;
      for (int64_t k = 0; k < t.n; ++k) row_[k] = labels_.valid[k] != R(0) ? r[k] : p[k];
      store_run(s_.posterior, s_.seg_storage, offset, t.n, row_);
    }
  }

  PixelTerms<V> log_space(const Tile& t, int64_t k, V scaled, V scaled_trace) {
    const int c = classes();
    const int64_t n = t.n - k < N ? t.n - k : N;
    const V valid = load(labels_.valid + k), zero = broadcast<V>(R(0));
    const auto fetch = [&](const void* src, Storage storage, int64_t offset, bool keep) {
      R run[N] = {};
      load_run(src, storage, offset + k, n, run);
      return keep ? load(run) : select(valid != zero, load(run), zero);
    };
    for (int j = 0; j < c; ++j) {
      slow_.s[j] = fetch(s_.seg_logits, s_.seg_storage, plane(t, t.image * c + j), s_.posterior != nullptr);
      for (int i = 0; i < c; ++i) slow_.a[i * c + j] = fetch(s_.cm_logits, s_.cm_storage, cm_offset(t, i, j), false);
    }
    const bool want_reported = s_.transition_gradient != nullptr;
    const auto terms = slow_.run(c, s_.transition, labels_.label + k, scaled, scaled_trace, want_reported);
    if (want_reported) slow_.add_reported(c, labels_.label + k, s_.transition_gradient + task_ * c * c);
    const V possible = select(terms.nll == std::numeric_limits<R>::infinity(), zero, broadcast<V>(R(1)));
    for (int j = 0; j < c; ++j) {
      const int64_t slot = j * tile_ + k;
      const V difference = select(scaled * possible == zero, zero, scaled * (slow_.p[j] - slow_.r[j]));
      store(p_ + slot, s_.posterior == nullptr ? difference : slow_.p[j]);
      store(q_ + slot, slow_.r[j]);
      // E holds the gradient itself from here on
      store(keep_ + slot, broadcast<V>(R(1)));
      store(drop_ + slot, zero);
      store(diag_ + slot, zero);
      if (!keep_field_) continue;
      for (int i = 0; i < c; ++i) store(column(i, j) + k, slow_.a[i * c + j]);
    }
    return terms;
  }

  // d loss / dT[i, y] -= weight / D * sum_j A[i,j] p[j], lane by lane into column y
  void add_transition_gradient(int64_t k, V scaled_inv_d) {
    const int c = classes();
    double* sum = s_.transition_gradient + task_ * c * c;
    for (int i = 0; i < c; ++i) {
      V ap = broadcast<V>(R(0));
      for (int j = 0; j < c; ++j)
        ap += load(column(i, j) + k) * (load(inv_z_ + j * tile_ + k) * load(p_ + j * tile_ + k));
      ap *= scaled_inv_d;
      for (int lane = 0; lane < N; ++lane) sum[i * c + labels_.label[k + lane]] -= static_cast<double>(ap[lane]);
    }
  }

  void store_pixels(R* map, V v, int64_t at, int64_t n) const {
    if (map == nullptr) return;
    if (n >= N) return store(map + at, v);
    for (int64_t k = 0; k < n; ++k) map[at + k] = v[k];
  }

  void zero_outputs(const Tile& t, int64_t at) {
    for (int64_t k = 0; k < t.n; ++k) {
      row_[k] = R(0);
      if (s_.nll_map != nullptr) s_.nll_map[at + k] = s_.trace_map[at + k] = R(0);
    }
    if (s_.seg_gradient == nullptr) return;
    for (int j = 0; j < classes(); ++j) {
      store_run(s_.seg_gradient, s_.seg_storage, plane(t, t.image * classes() + j), t.n, row_);
    }
  }

  // e (keep - T drop) [+ diag], see coarse_math.h; with everything it reads in local variables.
  struct Entry {
    const R *e, *keep, *drop, *reported, *diag;
    bool one_hot;
    R observed;
    COARSE_HD V at(int64_t k) const {
      V t = load(reported + k);
      if (one_hot) t = select(t == broadcast<V>(observed), broadcast<V>(R(1)), broadcast<V>(R(0)));
      const V g = load(e + k) * (load(keep + k) - t * load(drop + k));
      return diag == nullptr ? g : g + load(diag + k);
    }
  };
  Entry entry(int i, int j, const Tile& t) const {
    const int64_t at = j * tile_;
    return {column(i, j),
            keep_ + at,
            drop_ + at,
            t.reported + (one_hot() ? 0 : i * tile_),
            i == j ? diag_ + at : nullptr,
            one_hot(),
            static_cast<R>(i)};
  }

  int64_t gradient_offset(int i, int j, const Tile& t) const {
    return plane(t, (static_cast<int64_t>(accumulate_ ? 0 : t.image) * classes() + i) * classes() + j);
  }

  // Whether `stream_gradient` serves this tile: the storage is the compute type's own, in whole vectors.
  bool streams(const Tile& t) const { return want_cm_ && own_gradient_ && !accumulate_ && t.n == t.padded; }

  // Gradient of entry (i, j) for pixels [k, k + n) of the tile, whole lines past the caches. Where the image's size is
  // odd the planes begin anywhere in a line: vectors are then taken `head` pixels later, to end on lines, and the few
  // pixels before the first and after the last are stored as usual.
  COARSE_HD void stream_gradient(int i, int j, const Tile& t, int64_t k, int64_t n) {
    R* const out = static_cast<R*>(s_.cm_gradient) + gradient_offset(i, j, t);
    const Entry gradient = entry(i, j, t);
    const int64_t past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(out) % sizeof(V) / sizeof(R));
    if (past == 0) {
      for (int64_t u = k; u < k + n; u += N) stream(out + u, gradient.at(u));
      return;
    }
    const int64_t head = N - past;
    if (k == 0) store_part(out, gradient.at(0), head);
    for (int64_t u = k + head; u < k + n + head && u + N <= t.n; u += N) stream(out + u, gradient.at(u));
    if (k + n == t.n) {
      const V last = gradient.at(t.n - N);
      R run[N];
      store(run, last);
      memcpy(out + t.n - past, run + N - past, sizeof(R) * static_cast<size_t>(past));
    }
  }

  // kUnroll vectors past the caches. Halves are packed first: with 64-byte vectors two of them make a whole line, and
  // parts of lines stream several times slower than lines.
  COARSE_HD void stream_vectors(const V* g, int64_t offset) const {
    if (own_gradient_) {
      R* const out = static_cast<R*>(s_.cm_gradient) + offset;
      for (int u = 0; u < kUnroll; ++u) stream(out + u * N, g[u]);
      return;
    }
    if constexpr (sizeof(R) == 4) {
      alignas(64) uint16_t packed[kUnroll * N];
      if (s_.cm_gradient_storage == Storage::bf16) {
        for (int u = 0; u < kUnroll; ++u) store_bfloat16(packed + u * N, g[u]);
      } else {
        R run[kUnroll * N];
        for (int u = 0; u < kUnroll; ++u) store(run + u * N, g[u]);
        store_run(packed, Storage::f16, 0, kUnroll * N, run);
      }
      static_assert(sizeof(packed) == sizeof(V));
      stream(reinterpret_cast<float*>(static_cast<uint16_t*>(s_.cm_gradient) + offset),
             load(reinterpret_cast<const float*>(packed)));
    }
  }

  static void store_part(R* out, V v, int64_t n) {
    R run[N];
    store(run, v);
    memcpy(out, run, sizeof(R) * static_cast<size_t>(n));
  }

  // Step 3 for one column, where it does not go along with the next tile.
  void write_column(int j, const Tile& t) {
    if (!t.active || !want_cm_ || (t.zero && accumulate_)) return;
    for (int i = 0; i < classes(); ++i) {
      if (!t.zero && streams(t)) {
        stream_gradient(i, j, t, 0, t.n);
        continue;
      }
      for (int64_t k = 0; k < t.padded; k += N) store(row_ + k, t.zero ? broadcast<V>(R(0)) : entry(i, j, t).at(k));
      const int64_t offset = gradient_offset(i, j, t);
      if (accumulate_) {
        R* out = static_cast<R*>(s_.cm_gradient) + offset;
        for (int64_t k = 0; k < t.n; ++k) out[k] += row_[k];
      } else {
        store_run(s_.cm_gradient, s_.cm_gradient_storage, offset, t.n, row_);
      }
    }
  }

  const Stream<R>& s_;
  Arena arena_;
  int64_t tile_, task_ = 0;
  bool want_cm_, keep_field_, accumulate_, own_storage_, own_gradient_, aligned_planes_;
  R *field_, *reported_[2], *p_, *q_, *inv_z_, *ajj_, *keep_, *drop_, *diag_, *row_, *staged_;
  V* top_;  // per vector of pixels: the column's maximum
  LabelRun<R> labels_;
  LogSpace<R> slow_;
};

template <class R>
int64_t pixel_workspace(const Stream<R>& s) {
  return PixelGrid<R, 0>(s, nullptr).workspace_bytes();
}

template <class R>
void pixel_grid(const Stream<R>& s, int64_t task, int64_t b, int64_t begin, int64_t end, void* workspace) {
  // Two classes are common and cheap enough for the loops over classes to show.
  if (s.classes == 2) return PixelGrid<R, 2>(s, workspace).run(task, b, begin, end);
  PixelGrid<R, 0>(s, workspace).run(task, b, begin, end);
}

}  // namespace
}  // namespace coarse
