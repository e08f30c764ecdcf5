// The CPU operators without PyTorch (shim/): problems that take every kernel, on 1 to 4 threads, from one caller and
// from several at a time. Each has to give the bits that it gives on one thread; the sanitizer that this is built with
// sees the rest. Exit status 1 where bits differ.
#include <atomic>
#include <cstdio>
#include <string>

#include "../../csrc/cpu/ops_cpu.cpp"

namespace {

struct KindOf {
  std::vector<int64_t> grid;  // none: trusted
  bool shared = false;
  int64_t layers = 1;
  bool learned = false, weighted = false;
};

struct Sample {
  const char* name;
  int64_t classes, batch;
  std::vector<int64_t> size, seg;
  std::vector<KindOf> kinds;
  ScalarType storage = ScalarType::Float;
  ScalarType labels = ScalarType::Byte;
  bool per_pixel = false;
};

// --- values
// -----------------------------------------------------------------------------------------------------------

struct Random {
  uint64_t state;
  uint32_t next() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state >> 33);
  }
  float unit() { return static_cast<float>(next() & 0xffffff) / 0x1000000; }
};

std::vector<int64_t> joined(std::vector<int64_t> first, const std::vector<int64_t>& rest) {
  first.insert(first.end(), rest.begin(), rest.end());
  return first;
}

Tensor new_block(const std::vector<int64_t>& size, ScalarType type) {
  return torch::stable::empty(size, type, std::nullopt, torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

Tensor logits(const std::vector<int64_t>& size, ScalarType type, Random& random, float scale = 6) {
  Tensor t = new_block(size, type);
  for (int64_t k = 0; k < t.numel(); ++k) {
    const float value = scale * (random.unit() + random.unit() - 1);
    if (type == ScalarType::Double) {
      static_cast<double*>(t.data_ptr())[k] = value;
    } else if (type == ScalarType::Float) {
      static_cast<float*>(t.data_ptr())[k] = value;
    } else {
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      // bfloat16 is the upper half of a float; of float16 any finite number will do
      const uint16_t half = type == ScalarType::BFloat16 ? static_cast<uint16_t>(bits >> 16)
                                                         : static_cast<uint16_t>(random.next() & 0xbfff & ~0x4000u);
      static_cast<uint16_t*>(t.data_ptr())[k] = half;
    }
  }
  return t;
}

template <class R>
Tensor positive(const std::vector<int64_t>& size, Random& random) {
  Tensor t = new_block(size, sizeof(R) == 4 ? ScalarType::Float : ScalarType::Double);
  for (int64_t k = 0; k < t.numel(); ++k) static_cast<R*>(t.data_ptr())[k] = static_cast<R>(random.unit());
  return t;
}

Tensor labels_of(const std::vector<int64_t>& size, int64_t classes, ScalarType type, Random& random) {
  Tensor t = new_block(size, type);
  for (int64_t k = 0; k < t.numel(); ++k) {
    const int64_t label = k < t.numel() / 4 || random.unit() < 0.3f ? 255 : random.next() % classes;
    if (type == ScalarType::Byte) {
      static_cast<uint8_t*>(t.data_ptr())[k] = static_cast<uint8_t>(label);
    } else {
      static_cast<int64_t*>(t.data_ptr())[k] = label;
    }
  }
  return t;
}

template <class R>
Tensor transition_of(int64_t classes, Random& random) {
  Tensor t = positive<R>({classes, classes}, random);
  R* const values = static_cast<R*>(t.data_ptr());
  for (int64_t i = 0; i < classes; ++i) {
    R sum = 0;
    for (int64_t y = 0; y < classes; ++y)
      sum += values[i * classes + y] = i == y ? R(0) : values[i * classes + y] + R(0.1);
    for (int64_t y = 0; y < classes; ++y) values[i * classes + y] /= sum;
  }
  return t;
}

struct Given {
  Tensor seg;
  Tensors labels, cm, transition, class_weight, pixel_weight, scale;
  std::vector<double> weight, trace_weight;
  int64_t wanted = kSeg;
};

template <class R>
Given given(const Sample& sample) {
  Random random{static_cast<uint64_t>(sample.classes * 1000 + sample.size[0])};
  const Tensor absent = new_block({0}, sizeof(R) == 4 ? ScalarType::Float : ScalarType::Double);
  Given g;
  g.seg = logits(joined({sample.batch, sample.classes}, sample.seg), sample.storage, random);
  int64_t number = 0;
  for (const KindOf& kind : sample.kinds) {
    const std::vector<int64_t> drawn = joined({sample.batch, kind.layers}, sample.size);
    g.labels.push_back(labels_of(drawn, sample.classes, sample.labels, random));
    const int64_t images = kind.shared ? 1 : sample.batch;
    g.cm.push_back(kind.grid.empty()
                       ? absent
                       : logits(joined({images, sample.classes, sample.classes}, kind.grid), sample.storage, random));
    g.transition.push_back(kind.learned ? transition_of<R>(sample.classes, random) : absent);
    g.class_weight.push_back(kind.weighted ? positive<R>({sample.classes}, random) : absent);
    g.pixel_weight.push_back(kind.weighted ? positive<R>(drawn, random) : absent);
    g.scale.push_back(sample.per_pixel || number % 2 != 0 ? absent : positive<R>({1}, random));
    g.weight.push_back(sample.per_pixel ? 1.0 : 0.7);
    g.trace_weight.push_back(kind.grid.empty() ? 0.0 : 0.1);
    g.wanted |= cm_bit(number) | transition_bit(number);
    ++number;
  }
  return g;
}

// --- one problem
// ------------------------------------------------------------------------------------------------------

void append(std::string& bits, const Tensor& t) {
  if (t.numel() > 0)
    bits.append(static_cast<const char*>(t.data_ptr()),
                static_cast<size_t>(t.numel() * torch::stable::bytes_of(t.scalar_type())));
}

// All results of all operators, byte by byte.
template <class R>
std::string results(const Sample& sample) {
  const Given g = given<R>(sample);
  std::string bits;
  for (int64_t wanted : {g.wanted, int64_t{0}, kSeg}) {
    const Outputs out =
        annotation_objective<Cpu>(g.seg, g.labels, g.cm, g.transition, g.class_weight, g.pixel_weight, g.scale,
                                  g.weight, g.trace_weight, 255, sample.per_pixel, sample.per_pixel ? 0 : wanted);
    append(bits, std::get<0>(out));
    append(bits, std::get<4>(out));
    for (const Tensors* list :
         {&std::get<1>(out), &std::get<2>(out), &std::get<3>(out), &std::get<5>(out), &std::get<6>(out)})
      for (const Tensor& t : *list) append(bits, t);
  }
  append(bits, objective_posterior<Cpu>(g.seg, g.labels, g.cm, g.transition, 255));
  append(bits, label_map<Cpu>(g.seg, sample.size));
  append(bits, kernels_of<Cpu>(g.seg, g.labels, g.cm, g.transition, g.wanted));
  append(bits, find_bad_label(g.labels[0], sample.classes, 255));
  append(bits, labelled_weight<Cpu>(g.labels[0], std::nullopt, std::nullopt, sample.classes, 255));
  return bits;
}

std::string run(const Sample& sample, int threads) {
  torch::stable::thread_count() = threads;
  return sample.storage == ScalarType::Double ? results<double>(sample) : results<float>(sample);
}

// A label out of range is said, whichever thread meets it.
bool complains(int threads) {
  const Sample sample{"bad", 3, 1, {70, 130}, {70, 130}, {{{}, false, 1, false, false}}};
  Given g = given<float>(sample);
  static_cast<uint8_t*>(g.labels[0].data_ptr())[70 * 130 - 1] = 77;
  torch::stable::thread_count() = threads;
  try {
    annotation_objective<Cpu>(g.seg, g.labels, g.cm, g.transition, g.class_weight, g.pixel_weight, g.scale, g.weight,
                              g.trace_weight, 255, false, kSeg);
  } catch (const std::runtime_error& error) {
    return std::string(error.what()).find("labels: expected") != std::string::npos;
  }
  return false;
}

const std::vector<Sample>& samples() {
  using S = ScalarType;
  static const std::vector<Sample> all = {
      {"two classes, several tasks", 2, 2, {65, 131}, {65, 131}, {{{65, 131}, false, 1, true, true}}},
      {"a matrix a pixel", 5, 2, {33, 37}, {33, 37}, {{{33, 37}, false, 2, true, false}}},
      {"a matrix a pixel, C = 19, of the pool", 19, 1, {64, 72}, {16, 18}, {{{64, 72}, false, 1, false, true}}},
      {"one field for three images, pixels", 4, 3, {20, 23}, {20, 23}, {{{20, 23}, true, 1, true, false}}},
      {"strided, seams", 3, 2, {96, 40}, {24, 10}, {{{12, 5}, false, 1, true, true}}},
      {"strided, shared: copies of the gradient", 3, 3, {96, 40}, {96, 40}, {{{12, 5}, true, 1, false, false}}},
      {"cells of 100 rows", 2, 1, {200, 5}, {2, 2}, {{{2, 2}, false, 1, false, true}}},
      {"C above a vector, strided", 33, 1, {12, 20}, {3, 5}, {{{3, 5}, false, 1, true, false}}},
      {"one matrix an image", 5, 20, {37, 30}, {10, 8}, {{{1, 1}, false, 2, true, true}}},
      {"one matrix for all", 5, 20, {37, 30}, {37, 30}, {{{1, 1}, true, 1, true, true}}},
      {"trusted, several layers",
       3,
       2,
       {70, 130},
       {70, 130},
       {{{}, false, 3, true, true}, {{}, false, 5, false, false}}},
      {"trusted, coarse", 19, 2, {64, 68}, {16, 17}, {{{}, false, 1, false, false}, {{}, false, 1, true, true}}},
      {"trusted, one point", 2, 1, {70, 130}, {1, 1}, {{{}, false, 1, false, false}}},
      {"all forms",
       4,
       2,
       {33, 45},
       {9, 12},
       {{{33, 45}, false, 1, true, false},
        {{5, 7}, false, 2, true, true},
        {{1, 1}, true, 1, true, false},
        {{}, false, 2, true, true}}},
      {"rank 1", 4, 2, {9001}, {57}, {{{57}, false, 1, true, true}, {{1}, false, 1, true, false}}},
      {"rank 3", 3, 2, {5, 19, 18}, {2, 3, 5}, {{{2, 3, 5}, false, 1, true, true}, {{}, false, 2, false, false}}},
      {"one pixel", 3, 2, {1, 1}, {1, 1}, {{{1, 1}, false, 1, true, true}}},
      {"a column", 3, 1, {700, 1}, {300, 1}, {{{300, 1}, false, 1, false, false}}},
      {"bfloat16",
       5,
       2,
       {33, 45},
       {9, 12},
       {{{9, 12}, true, 1, true, true}, {{33, 45}, false, 1, false, false}},
       S::BFloat16,
       S::Long},
      {"float16",
       5,
       2,
       {33, 45},
       {33, 45},
       {{{9, 12}, false, 1, true, true}, {{1, 1}, true, 1, false, false}},
       S::Half},
      {"float64",
       5,
       2,
       {33, 45},
       {9, 12},
       {{{9, 12}, true, 1, true, true}, {{33, 45}, false, 1, false, false}, {{1, 1}, true, 1, true, false}},
       S::Double},
      {"maps",
       4,
       2,
       {33, 45},
       {9, 12},
       {{{5, 7}, false, 2, true, true}, {{}, false, 2, true, true}},
       S::Float,
       S::Long,
       true},
      {"no images", 3, 0, {8, 9}, {4, 5}, {{{2, 3}, true, 1, true, false}}},
      {"many classes", 150, 1, {4, 13}, {2, 5}, {{{}, false, 1, true, true}, {{1, 1}, false, 1, false, false}}},
  };
  return all;
}

}  // namespace

int main() {
  int runs = 0;
  std::atomic<int> wrong{0};
  std::vector<std::string> expected;
  for (const Sample& sample : samples()) {
    if (sample.batch == 0) {  // nothing to be asked about kernels of no pixel
      expected.emplace_back();
      continue;
    }
    expected.push_back(run(sample, 1));
    for (int threads : {2, 3, 4}) {
      ++runs;
      if (run(sample, threads) == expected.back()) continue;
      ++wrong;
      std::printf("%s: other bits on %d threads\n", sample.name, threads);
    }
  }
  for (int threads : {1, 3}) {
    ++runs;
    if (complains(threads)) continue;
    ++wrong;
    std::printf("a label out of range was not said on %d threads\n", threads);
  }
  // Several callers, each with threads of its own, and one that empties the pool meanwhile.
  std::atomic<bool> done{false};
  std::thread emptying([&done] {
    for (int64_t k = 0; !done; ++k) {
      Pool::instance().set_limit((k % 3) * (int64_t{8} << 20));
      Pool::instance().empty();
      std::this_thread::yield();
    }
  });
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&, caller] {
      for (size_t k = 0; k < samples().size(); ++k) {
        const size_t own = (k + static_cast<size_t>(caller) * 5) % samples().size();
        if (samples()[own].batch == 0) continue;
        if (run(samples()[own], 1 + caller % 3) != expected[own]) {
          ++wrong;
          std::printf("%s: other bits beside other callers\n", samples()[own].name);
        }
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  done = true;
  emptying.join();
  runs += static_cast<int>(4 * samples().size());
  std::printf("%s: %d runs of %zu problems, %d wrong\n", coarse::kernels().isa, runs, samples().size(), wrong.load());
  return wrong == 0 ? 0 : 1;
}
