// CM logits on the pixel grid: every logit is read once and every gradient written once.
//
// A tile of pixels goes through three steps, with the exponentials of its C x C logits kept in cache (`field_`)
// meanwhile:
//   1. for each column j: load, shift by the column maximum, exponentiate, sum (Z, q)
//   2. per pixel: D, posterior, loss, and the three coefficients of each column's gradient (coarse_math.h)
//   3. for each column j: exponentials * coefficients, streamed to memory
//
// Memory is the limit (2 C x C x 4 bytes a pixel), arithmetic comes second (C x C exponentials), so one loop keeps both
// busy (`pipeline`): for column j it exponentiates this tile's logits, streams out the gradient of the tile before from
// the slots that they go to, and fetches the logits of column j + 1. In separate loops reading, computing and writing
// wait for one another, which takes 1.3 times as long (C = 19).
//
// Several layers of labels share the matrix, and so the exponentials: each adds its q, its posterior, and its
// coefficients.
#pragma once

#include "class_field.h"

namespace coarse {
namespace {

constexpr int64_t kMaxTile = 256;  // pixels: a run of 1 KB in each of the C x C planes

constexpr int kUnroll = 2;  // vectors of a plane that are worked on together

template <class R>
inline int64_t tile_pixels(int classes) {
  constexpr int64_t kStep = kUnroll * kLanes<R>;
  const int64_t bytes = second_level_cache() * 3 / 8;  // of E: most of the cache is left to streams in flight
  const int64_t fit = bytes / (static_cast<int64_t>(classes) * classes * static_cast<int64_t>(sizeof(R)));
  const int64_t tile = fit < kMaxTile ? fit / kStep * kStep : kMaxTile;
  return tile < kStep ? kStep : tile;
}

template <class R, int kClasses>
class PixelGrid {
  using V = Vec<R>;
  static constexpr int N = kLanes<R>;

 public:
  void init(const Problem<R>& problem, const Drawings<R>& kind, Arena& arena) {
    problem_ = &problem;
    kind_ = &kind;
    tile_ = tile_pixels<R>(problem.classes);
    const int64_t c = problem.classes, t = tile_, layers = kind.layers;
    want_cm_ = kind.field.gradient != nullptr;
    keep_field_ = want_cm_ || kind.transition_gradient != nullptr;
    accumulate_ = kind.field.images == 1 && problem.batch > 1;
    constexpr Storage own = sizeof(R) == 4 ? Storage::f32 : Storage::f64;
    own_storage_ = kind.field.storage == own;
    field_ = arena.take<R>(c * t * (keep_field_ ? c : 1));
    for (R*& reported : reported_) reported = arena.take<R>(layers * layer_stride());
    q_ = arena.take<R>(layers * c * t);
    inv_z_ = arena.take<R>(c * t);
    ajj_ = arena.take<R>(c * t);
    keep_ = arena.take<R>(c * t);
    drop_ = arena.take<R>(layers * c * t);
    diag_ = arena.take<R>(c * t);
    row_ = arena.take<R>(t);
    staged_ = arena.take<R>(c * t);
    evidence_ = arena.take<V>(layers);
    top_ = arena.take<V>(t / N);
    labels_ = arena.take<LabelRun<R>>(layers);
    summed_ = layers > 1 ? arena.take<V>(c * c) : nullptr;
    slow_.take(arena, c);
  }

  // The gradient: the field's own, or, where images share it, the sums that `sum` (C, C, pixels) collects.
  void begin(R* sum) {
    gradient_ = accumulate_ ? sum : kind_->field.gradient;
    gradient_storage_ = accumulate_ ? (sizeof(R) == 4 ? Storage::f32 : Storage::f64) : kind_->field.storage;
    constexpr Storage own = sizeof(R) == 4 ? Storage::f32 : Storage::f64;
    own_gradient_ = gradient_storage_ == own;
    aligned_planes_ =
        reinterpret_cast<uintptr_t>(gradient_) % sizeof(V) == 0 && problem_->pixels() % (kUnroll * N) == 0;
    pending_ = Tile{};
    which_ = 0;
  }

  // The vectors of a slab, as tiles of neighbouring pixels.
  void run(ClassField<R>& field, const Slab& slab, const LabelRun<R>* layers, const Sums& sums) {
    totals_ = sums;
    class_field_ = &field;
    pitch_ = static_cast<int64_t>(slab.pitch) * N;
    for (int r = 0; r < slab.rows; ++r) {
      const int64_t begin = ((slab.z * problem_->height) + slab.y0 + r) * problem_->width + slab.x0;
      const int64_t width = slab.x1 - slab.x0;
      for (int64_t k = 0; k < width; k += tile_) {
        const int64_t n = width - k < tile_ ? width - k : tile_;
        first_ = r * slab.per_row * N + k;
        for (int64_t l = 0; l < kind_->layers; ++l) {
          labels_[l] = layers[l];
          labels_[l].label += first_;
          labels_[l].valid += first_;
          labels_[l].weight += first_;
        }
        const Tile tile{true, false, slab.image, begin + k, n, round_up(n, kUnroll * N), reported_[which_]};
        pending_ = step(tile, pending_);
        which_ ^= 1;
      }
    }
  }

  void finish() {
    for (int j = 0; j < classes(); ++j) write_column(j, pending_);
    pending_ = Tile{};
    stream_fence();
  }

 private:
  struct Tile {
    bool active = false, zero = false;
    int64_t image = 0, x = 0, n = 0, padded = 0;
    R* reported = nullptr;  // (layers, C, tile) T[i, y]; of positive drawings (layers, tile) the labels, as numbers
  };

  int classes() const { return kClasses > 0 ? kClasses : problem_->classes; }
  bool one_hot() const { return kind_->transition == nullptr; }
  bool one_layer() const { return kind_->layers == 1; }
  int64_t layer_stride() const { return tile_ * (one_hot() ? 1 : problem_->classes); }
  R* column(int i, int j) const { return field_ + (keep_field_ ? static_cast<int64_t>(i) * classes() + j : i) * tile_; }
  int64_t plane(const Tile& t, int64_t index) const { return index * problem_->pixels() + t.x; }
  // (C, tile) of a layer
  R* q(int64_t layer) const { return q_ + layer * classes() * tile_; }
  R* drop(int64_t layer) const { return drop_ + layer * classes() * tile_; }
  const R* p(int j) const { return reinterpret_cast<const R*>(class_field_->p) + j * pitch_ + first_; }
  const R* s(int j) const { return reinterpret_cast<const R*>(class_field_->s) + j * pitch_ + first_; }
  V* of_class_field(V* x, int64_t j, int64_t k) const {
    return reinterpret_cast<V*>(reinterpret_cast<R*>(x) + j * pitch_ + first_ + k);
  }
  V valid(int64_t k) const {  // in some layer
    V any = load(labels_[0].valid + k);
    for (int64_t l = 1; l < kind_->layers; ++l) any = max_v(any, load(labels_[l].valid + k));
    return any;
  }

  // Steps 1 and 2 of `tile`, with step 3 of `pending` between its columns. Returns what is to be written next.
  Tile step(Tile tile, const Tile& pending) {
    bool any_valid = false;
    all_valid_ = true;
    for (int64_t l = 0; l < kind_->layers; ++l) {
      any_valid = any_valid || labels_[l].any_valid;
      all_valid_ = all_valid_ && labels_[l].all_valid;
    }
    if (!any_valid) {
      for (int j = 0; j < classes(); ++j) write_column(j, pending);
      tile.zero = true;
      zero_tile(tile);
      return tile;
    }
    for (int64_t l = 0; l < kind_->layers; ++l) {
      R* const reported = tile.reported + l * layer_stride();
      const int32_t* const label = labels_[l].label;
      if (one_hot()) {
        for (int64_t k = 0; k < tile.padded; ++k) reported[k] = static_cast<R>(label[k]);
      } else {
        report_run(kind_->transition, classes(), label, tile.padded, reported, tile_);
      }
    }
    const bool whole = tile.n == tile.padded;
    const bool together = whole && pending.active && !pending.zero && pending.n == tile.n && want_cm_ && !accumulate_ &&
                          aligned_planes_ && one_layer() && pending.x % (kUnroll * N) == 0;
    for (int j = 0; j < classes(); ++j) {
      if (!together) write_column(j, pending);
      stage_column(j, tile);
      const Tile* leaving = together ? &pending : nullptr;
      one_hot() ? pipeline<true>(j, tile, leaving) : pipeline<false>(j, tile, leaving);
      for (int64_t l = 1; l < kind_->layers; ++l) further_layer(j, l, tile);
    }
    one_layer() ? finish_tile<true>(tile) : finish_tile<false>(tile);
    return tile;
  }

  int64_t cm_offset(const Tile& t, int i, int j) const {
    return image_offset(t) + plane(t, static_cast<int64_t>(i) * classes() + j);
  }

  int64_t image_offset(const Tile& t) const {
    return kind_->field.images == 1 ? 0 : t.image * kind_->field.image_stride;
  }

  // The logits of column j, and their maximum over i. Those that nobody labelled may be anything, NaN too: they count
  // as 0.
  void stage_column(int j, const Tile& t) {
    R* const staged = staged_;
    V* const top = top_;
    const bool whole = t.n == t.padded, masked = !all_valid_;
    const V zero = broadcast<V>(R(0));
    for (int64_t k = 0; k < t.padded; k += N) top[k / N] = broadcast<V>(-std::numeric_limits<R>::infinity());
    const auto stage = [&](R* run, const auto& logits) {
      for (int64_t k = 0, n = t.padded; k < n; k += N) {
        V x = logits(k);
        if (masked) x = select(valid(k) != zero, x, zero);
        store(run + k, x);
        top[k / N] = max_v(x, top[k / N]);
      }
    };
    for (int i = 0; i < classes(); ++i) {
      R* const run = staged + i * tile_;
      const int64_t offset = cm_offset(t, i, j);
      if (whole && own_storage_) {
        const R* const logits = static_cast<const R*>(kind_->field.data) + offset;
        stage(run, [&](int64_t k) { return load(logits + k); });
        continue;
      }
      if constexpr (sizeof(R) == 4) {
        if (whole && kind_->field.storage == Storage::bf16) {
          const uint16_t* const logits = static_cast<const uint16_t*>(kind_->field.data) + offset;
          stage(run, [&](int64_t k) { return load_bfloat16(logits + k); });
          continue;
        }
      }
      load_run(kind_->field.data, kind_->field.storage, offset, t.n, run);
      for (int64_t k = t.n; k < t.padded; ++k) run[k] = R(0);
      stage(run, [&](int64_t k) { return load(run + k); });
    }
  }

  // Column j of tile t: exponentials of the staged logits, and their sums over i; with `pending`, the gradient of that
  // tile leaves the slots first. kOneHot: T is the identity, so T[i, y] is a comparison. A few vectors of a plane at a
  // time, so that all sums and coefficients stay in registers. Meanwhile the next column is fetched, in runs of a tile:
  // DRAM serves whole kilobytes of a plane twice as fast as lines of one plane after the other.
  template <bool kOneHot>
  void pipeline(int j, const Tile& t, const Tile* pending) {
    const int c = classes();
    const int64_t tile = tile_, slot_stride = (keep_field_ ? c : 1) * tile_, plane_stride = c * problem_->pixels();
    const R* const staged = staged_;
    const V *const top = top_, zero = broadcast<V>(R(0));
    R* const slots = column(0, j);
    const int64_t column_at = j * tile;
    const bool emit = pending != nullptr;
    const int64_t leaving_at = emit ? gradient_offset(0, j, *pending) : 0;
    const R* const leaving_reported = emit ? pending->reported : nullptr;

    // The next column's lines, in order. After the last column: the first of the next tile (a prefetch may miss the
    // end).
    const int64_t element = bytes_of(kind_->field.storage);
    const bool last = j + 1 == c;
    const char* line =
        static_cast<const char*>(kind_->field.data) + element * (cm_offset(t, 0, last ? 0 : j + 1) + (last ? tile : 0));
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
        V e[kUnroll];
        for (int u = 0; u < kUnroll; ++u) e[u] = load(staged + i * tile + k + u * N) - shift[u];
        exp_each<kUnroll>(e);
        for (int u = 0; u < kUnroll; ++u) {
          store(slot + u * N, e[u]);
          z[u] += e[u];
          if constexpr (kOneHot) {
            q[u] += select(label[u] == observed, e[u], zero);
          } else {
            q[u] += e[u] * load(t.reported + i * tile + k + u * N);
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

  // q of column j in another layer, from the exponentials that `pipeline` has left.
  void further_layer(int j, int64_t layer, const Tile& t) {
    const R* const reported = t.reported + layer * layer_stride();
    const int32_t* const label = labels_[layer].label;
    R* const to = q(layer) + j * tile_;
    if (one_hot()) {
      for (int64_t k = 0; k < t.padded; ++k) to[k] = column(label[k], j)[k] * inv_z_[j * tile_ + k];
      return;
    }
    for (int64_t k = 0; k < t.padded; k += N) {
      V sum = broadcast<V>(R(0));
      for (int i = 0; i < classes(); ++i) sum += load(column(i, j) + k) * load(reported + i * tile_ + k);
      store(to + k, sum * load(inv_z_ + j * tile_ + k));
    }
  }

  template <bool kOneLayer>
  void finish_tile(const Tile& t) {
    const int c = classes();
    const int64_t tile = tile_, pitch = pitch_, layers = kOneLayer ? 1 : kind_->layers;
    const V zero = broadcast<V>(R(0)), one = broadcast<V>(R(1)), smallest = broadcast<V>(kSmallestEvidence<R>);
    const R gradient_scale = kind_->gradient_scale, trace_weight = kind_->trace_weight;
    const R *const p0 = p(0), *const q0 = q_, *const inv_z = inv_z_, *const ajj = ajj_;
    R *const keep = keep_, *const drop0 = drop_, *const diag = diag_;
    R* const own = reinterpret_cast<R*>(class_field_->own) + first_;
    R* const mass = reinterpret_cast<R*>(class_field_->mass) + first_;
    for (int64_t k = 0; k < t.n; k += N) {
      if (problem_->posterior != nullptr) {
        add_to_joint(t, k);
        continue;
      }
      bool small = false;
      V first_evidence = zero;
      for (int64_t l = 0; l < layers; ++l) {
        V d = zero;
        for (int j = 0; j < c; ++j) d += load(p0 + j * pitch + k) * load(q0 + (l * c + j) * tile + k);
        if constexpr (kOneLayer) first_evidence = d;
        if constexpr (!kOneLayer) evidence_[l] = d;
        small = small || any(!(d >= smallest));
      }
      if (small) {
        log_space(t, k);
        continue;
      }
      V trace = zero;
      for (int j = 0; j < c; ++j) trace += load(ajj + j * tile + k);
      for (int64_t l = 0; l < layers; ++l) {
        const V d = kOneLayer ? first_evidence : evidence_[l], inv_d = one / d, weight = load(labels_[l].weight + k);
        const V scaled = weight * gradient_scale, scaled_trace = scaled * trace_weight;
        if (totals_.transition != nullptr) add_transition_gradient(l, k, scaled * inv_d);
        for (int j = 0; j < c; ++j) {
          const int64_t slot = j * tile + k;
          const V pj = load(p0 + j * pitch + k), r = pj * load(q0 + l * c * tile + slot) * inv_d;
          const auto g = column_gradient(pj, r, inv_d, load(inv_z + slot), load(ajj + slot), scaled, scaled_trace);
          store(drop0 + l * c * tile + slot, g.drop);
          store(keep + slot, l == 0 ? g.keep : load(keep + slot) + g.keep);
          store(diag + slot, l == 0 ? g.diag : load(diag + slot) + g.diag);
          store(own + j * pitch + k, load(own + j * pitch + k) - scaled * r);
        }
        store(mass + k, load(mass + k) + scaled);
        add(t, l, k, -log_v(d), trace);
      }
    }
    terms_.leave(totals_);
  }

  COARSE_HD void add(const Tile& t, int64_t layer, int64_t k, V nll, V trace) {
    const int64_t lanes = t.n - k < N ? t.n - k : N;
    terms_.add(*kind_, map_offset(t, layer) + k, lanes, load(labels_[layer].weight + k), nll, trace);
  }

  int64_t map_offset(const Tile& t, int64_t layer) const {
    return (t.image * kind_->layers + layer) * problem_->pixels() + t.x;
  }

  // The logits of a vector of pixels, into slow_.
  void fetch(const Tile& t, int64_t k) {
    const int c = classes();
    const int64_t n = t.n - k < N ? t.n - k : N;
    const V known = valid(k), zero = broadcast<V>(R(0));
    for (int j = 0; j < c; ++j) {
      slow_.s[j] = load(s(j) + k);
      for (int i = 0; i < c; ++i) {
        R run[N] = {};
        load_run(kind_->field.data, kind_->field.storage, cm_offset(t, i, j) + k, n, run);
        slow_.a[i * c + j] = select(known != zero, load(run), zero);
      }
    }
  }

  // log q of every layer. The product of all kinds counts, so that each factor has to be exact.
  void add_to_joint(const Tile& t, int64_t k) {
    const int c = classes();
    const V zero = broadcast<V>(R(0)), smallest = broadcast<V>(kSmallestEvidence<R>);
    for (int64_t l = 0; l < kind_->layers; ++l) {
      const V known = load(labels_[l].valid + k);
      bool small = false;
      for (int j = 0; j < c; ++j) small = small || any(!(load(q(l) + j * tile_ + k) >= smallest));
      if (small) {
        fetch(t, k);
        slow_.run(c, kind_->transition, labels_[l].label + k, zero, zero, false);
      }
      for (int j = 0; j < c; ++j) {
        const V log_q = small ? slow_.columns[j].log_q : log_v(load(q(l) + j * tile_ + k));
        *of_class_field(class_field_->joint, j, k) += select(known != zero, log_q, zero);
      }
    }
  }

  void log_space(const Tile& t, int64_t k) {
    const int c = classes();
    const V zero = broadcast<V>(R(0)), inf = broadcast<V>(std::numeric_limits<R>::infinity());
    const bool want_reported = totals_.transition != nullptr;
    for (int64_t l = 0; l < kind_->layers; ++l) {
      const V weight = load(labels_[l].weight + k);
      const V scaled = weight * kind_->gradient_scale, scaled_trace = scaled * kind_->trace_weight;
      fetch(t, k);
      const auto terms = slow_.run(c, kind_->transition, labels_[l].label + k, scaled, scaled_trace, want_reported);
      if (want_reported) slow_.add_reported(c, labels_[l].label + k, totals_.transition);
      const V live = select(terms.nll == inf, zero, scaled);
      for (int j = 0; j < c; ++j)
        *of_class_field(class_field_->own, j, k) -= select(live == zero, zero, live * slow_.r[j]);
      *reinterpret_cast<V*>(reinterpret_cast<R*>(class_field_->mass) + first_ + k) += live;
      add(t, l, k, terms.nll, terms.trace);
      if (one_layer()) continue;
      for (int ij = 0; ij < c * c; ++ij) summed_[ij] = l == 0 ? slow_.a[ij] : summed_[ij] + slow_.a[ij];
    }
    const V* const gradient = one_layer() ? slow_.a : summed_;
    for (int j = 0; j < c; ++j) {
      const int64_t slot = j * tile_ + k;
      // E holds the gradient itself from here on
      store(keep_ + slot, broadcast<V>(R(1)));
      for (int64_t l = 0; l < kind_->layers; ++l) store(drop(l) + slot, zero);
      store(diag_ + slot, zero);
      if (!keep_field_) continue;
      for (int i = 0; i < c; ++i) store(column(i, j) + k, gradient[i * c + j]);
    }
  }

  // d loss / dT[i, y] -= weight / D * sum_j A[i,j] p[j], lane by lane into column y
  void add_transition_gradient(int64_t layer, int64_t k, V scaled_inv_d) {
    const int c = classes();
    double* const sum = totals_.transition;
    for (int i = 0; i < c; ++i) {
      V ap = broadcast<V>(R(0));
      for (int j = 0; j < c; ++j) ap += load(column(i, j) + k) * (load(inv_z_ + j * tile_ + k) * load(p(j) + k));
      ap *= scaled_inv_d;
      for (int lane = 0; lane < N; ++lane) sum[i * c + labels_[layer].label[k + lane]] -= static_cast<double>(ap[lane]);
    }
  }

  void zero_tile(const Tile& t) {
    if (kind_->nll_map == nullptr) return;
    for (int64_t l = 0; l < kind_->layers; ++l) {
      for (int64_t k = 0; k < t.n; ++k)
        kind_->nll_map[map_offset(t, l) + k] = kind_->trace_map[map_offset(t, l) + k] = R(0);
    }
  }

  // e (keep - T drop) [+ diag], see coarse_math.h; with everything it reads in local variables.
  struct Entry {
    const R *e, *keep, *drop, *reported, *diag;
    bool one_hot;
    R observed;
    int64_t layers, drop_step, reported_step;  // of further layers
    COARSE_HD V at(int64_t k) const {
      V factor = load(keep + k);
      for (int64_t l = 0; l < layers; ++l) {
        V t = load(reported + l * reported_step + k);
        if (one_hot) t = select(t == broadcast<V>(observed), broadcast<V>(R(1)), broadcast<V>(R(0)));
        factor -= t * load(drop + l * drop_step + k);
      }
      const V g = load(e + k) * factor;
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
            static_cast<R>(i),
            kind_->layers,
            classes() * tile_,
            layer_stride()};
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
    R* const out = static_cast<R*>(gradient_) + gradient_offset(i, j, t);
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
      R* const out = static_cast<R*>(gradient_) + offset;
      for (int u = 0; u < kUnroll; ++u) stream(out + u * N, g[u]);
      return;
    }
    if constexpr (sizeof(R) == 4) {
      static_assert(kUnroll == 2);
      float* const out = reinterpret_cast<float*>(static_cast<uint16_t*>(gradient_) + offset);
      if (gradient_storage_ == Storage::bf16) return stream(out, pack_bfloat16(g[0], g[1]));
      R run[kUnroll * N];
      for (int u = 0; u < kUnroll; ++u) store(run + u * N, g[u]);
      alignas(64) uint16_t packed[kUnroll * N];
      store_run(packed, Storage::f16, 0, kUnroll * N, run);
      stream(out, load(reinterpret_cast<const float*>(packed)));
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
        R* out = static_cast<R*>(gradient_) + offset;
        for (int64_t k = 0; k < t.n; ++k) out[k] += row_[k];
      } else {
        store_run(gradient_, gradient_storage_, offset, t.n, row_);
      }
    }
  }

  const Problem<R>* problem_ = nullptr;
  const Drawings<R>* kind_ = nullptr;
  ClassField<R>* class_field_ = nullptr;
  int64_t tile_ = 0;
  int64_t pitch_ = 0, first_ = 0;  // of the class field, in elements: between its planes; of the tile in a plane
  bool want_cm_ = false, keep_field_ = false, accumulate_ = false, own_storage_ = false, own_gradient_ = false;
  bool aligned_planes_ = false, all_valid_ = false;
  void* gradient_ = nullptr;
  Storage gradient_storage_ = Storage::f32;
  Tile pending_;
  int which_ = 0;
  R *field_, *reported_[2], *q_, *inv_z_, *ajj_, *keep_, *drop_, *diag_, *row_, *staged_;
  V *evidence_, *summed_;
  Terms<R> terms_;
  Sums totals_{};
  V* top_;               // per vector of pixels: the column's maximum
  LabelRun<R>* labels_;  // of each layer, from the tile's first pixel on
  LogSpace<R> slow_;
};

}  // namespace
}  // namespace coarse
