// Kernels for one step of decoding on a CPU; __init__.py says what each computes and when it is used.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/utils/pybind.h>

#include <tuple>
#include <vector>

#include "products.h"

using at::Tensor;
using std::optional;

// ------------------------------------------------------------------------------- tensors and threads
template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

// work(type tag) for the type of t's numbers.
template <class Work>
void by_type(const Tensor& t, Work work) {
  if (t.scalar_type() == at::kFloat)
    work(float{});
  else if (t.scalar_type() == at::kBFloat16)
    work(bf16{});
  else
    TORCH_CHECK(false, "native kernels compute in fp32 and bf16, not in ", t.scalar_type());
}

// work(begin, end) for parts of 0..count on torch's threads; one item reads `bytes`, 32 KB pay for a thread.
template <class Work>
void spread(int64_t count, int64_t bytes, Work work) {
  at::parallel_for(0, count, 32768 / std::max<int64_t>(bytes, 1) + 1, work);
}

// y [N,H,R] = x [N,H,K] w [H,R,K]^T: every head its own matrix, its rows `stride` apart. bias [H,R] or null.
template <class T>
void dot_rows(const T* x, int64_t n, int64_t x_row, int64_t x_head, const T* w, int64_t w_head, int64_t stride,
              int64_t heads, int64_t rows, int64_t width, const T* bias, T* y) {
  int64_t blocks = (rows + BLOCK - 1) / BLOCK;
  spread(heads * blocks, BLOCK * width * sizeof(T), [&](int64_t begin, int64_t end) {
    std::vector<const T*> a(n);
    std::vector<float> out(n * BLOCK);
    for (int64_t at = begin; at < end; at++) {
      int64_t head = at / blocks, start = at % blocks * BLOCK, some = std::min(BLOCK, rows - start);
      for (int64_t i = 0; i < n; i++) a[i] = x + i * x_row + head * x_head;
      dots(a.data(), n, w + head * w_head + start * stride, stride, some, width, out.data(), BLOCK);
      for (int64_t i = 0; i < n; i++) {
        T* to = y + (i * heads + head) * rows + start;
        const float* from = &out[i * BLOCK];
        if (bias)
          for (int64_t r = 0; r < some; r++) put(from[r] + get(bias + head * rows + start + r), to + r);
        else
          for (int64_t r = 0; r < some; r++) put(from[r], to + r);
      }
    }
  });
}

// The same with w [H,K,R].
template <class T>
void mix_rows(const T* x, int64_t n, int64_t x_row, int64_t x_head, const T* w, int64_t w_head, int64_t stride,
              int64_t heads, int64_t inner, int64_t width, T* y) {
  spread(heads, inner * width * sizeof(T), [&](int64_t begin, int64_t end) {
    int64_t room = whole(width, Pack<T>::size);
    std::vector<float> p(n * inner), total(n * room);
    std::vector<const float*> from(n);
    std::vector<float*> into(n);
    for (int64_t i = 0; i < n; i++) from[i] = &p[i * inner], into[i] = &total[i * room];
    for (int64_t head = begin; head < end; head++) {
      for (int64_t i = 0; i < n; i++)
        for (int64_t k = 0; k < inner; k++) p[i * inner + k] = get(x + i * x_row + head * x_head + k);
      std::fill(total.begin(), total.end(), 0.0f);
      mix(from.data(), n, w + head * w_head, stride, inner, width, into.data());
      for (int64_t i = 0; i < n; i++) finish(into[i], y + (i * heads + head) * width, width);
    }
  });
}

Tensor linear(const Tensor& x_, const Tensor& w, const optional<Tensor>& bias) {
  Tensor x = x_.contiguous();
  int64_t width = x.size(-1), rows = w.numel() / width, n = x.numel() / width;
  TORCH_CHECK(w.is_contiguous() && w.size(-1) == width && w.scalar_type() == x.scalar_type(), "linear: weight");
  TORCH_CHECK(!bias || (bias->numel() == rows && bias->scalar_type() == x.scalar_type()), "linear: bias");
  auto shape = x.sizes().vec();
  shape.back() = rows;
  Tensor y = at::empty(shape, x.options());
  by_type(x, [&](auto tag) {
    using T = decltype(tag);
    const T* add = bias ? data<T>(*bias) : nullptr;
    dot_rows<T>(data<T>(x), n, width, 0, data<T>(w), 0, width, 1, rows, width, add, data<T>(y));
  });
  return y;
}

Tensor per_head(const Tensor& x, const Tensor& w) {
  int64_t n = x.size(0), heads = x.size(1), inner = x.size(2), rows = w.size(2);
  TORCH_CHECK(w.size(0) == heads && w.size(1) == inner && w.scalar_type() == x.scalar_type(), "per_head: weight");
  TORCH_CHECK(x.stride(2) == 1 && (w.stride(1) == 1 || w.stride(2) == 1), "per_head: strides");
  Tensor y = at::empty({n, heads, rows}, x.options());
  by_type(x, [&](auto tag) {
    using T = decltype(tag);
    const T *from = data<T>(x), *b = data<T>(w);
    if (w.stride(1) == 1)
      dot_rows<T>(from, n, x.stride(0), x.stride(1), b, w.stride(0), w.stride(2), heads, rows, inner, nullptr, data<T>(y));
    else
      mix_rows<T>(from, n, x.stride(0), x.stride(1), b, w.stride(0), w.stride(1), heads, inner, rows, data<T>(y));
  });
  return y;
}

// ---------------------------------------------------------------------------------------- attention
// scores [n] -> softmax(scale scores), in place; there is room for whole vectors.
inline void softmax(float* scores, int64_t n, float scale) {
  for (int64_t s = n; s < whole(n, LANES); s++) scores[s] = -INFINITY;
  Floats most = all(-INFINITY), total = {};
  auto each = [&](auto work) {
    for (int64_t s = 0; s < n; s += LANES) {
      Floats v;
      std::memcpy(&v, scores + s, sizeof v);
      v = work(v);
      std::memcpy(scores + s, &v, sizeof v);
    }
  };
  each([&](Floats v) { return v *= scale, most = v > most ? v : most, v; });
  float top = most[0];
  for (int i = 1; i < LANES; i++) top = std::max(top, most[i]);
  each([&](Floats v) { return v = v == -INFINITY ? Floats{} : exponential(v - top), total += v, v; });
  float share = 1.0f / sum(total);
  each([&](Floats v) { return v * share; });
}

// q [B,T,H,hd], k [B,S,K,hd], v [B,S,K,vd], positions [B,T] -> [B,T,H,vd]. The query at position p sees slots
// 0..p, or the last `window` of them; -1 (nobody's) sees slot 0. Only the slots that are seen are read.
Tensor attend(const Tensor& q_, const Tensor& k, const Tensor& v, const Tensor& positions, double scale,
              optional<int64_t> window) {
  Tensor q = q_.contiguous(), where = positions.to(at::kLong).contiguous();
  int64_t batch = q.size(0), length = q.size(1), heads = q.size(2), width = q.size(3);
  int64_t slots = k.size(1), kv_heads = k.size(2), value_width = v.size(3), group = heads / kv_heads;
  TORCH_CHECK(k.stride(3) == 1 && v.stride(3) == 1, "attend: strides");
  TORCH_CHECK(k.size(0) == batch && k.size(3) == width && v.size(1) == slots && v.size(2) == kv_heads, "attend: shapes");
  TORCH_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(), "attend: types");
  TORCH_CHECK(positions.size(0) == batch && positions.size(1) == length && heads % kv_heads == 0, "attend: shapes");
  Tensor y = at::empty({batch, length, heads, value_width}, q.options());
  const int64_t* at_position = where.data_ptr<int64_t>();
  for (int64_t i = 0; i < batch * length; i++) TORCH_CHECK(at_position[i] < slots, "attend: position past the slots");
  // Heads of a group share the reading of keys and values; they part only to give every thread some.
  int64_t queries = batch * length * kv_heads, together = queries < at::get_num_threads() ? 2 : 8;
  int64_t parts = (group + together - 1) / together;
  by_type(q, [&](auto tag) {
    using T = decltype(tag);
    spread(queries * parts, slots * (width + value_width) * sizeof(T), [&](int64_t begin, int64_t end) {
      int64_t score_room = whole(slots, BLOCK), room = whole(value_width, Pack<T>::size);
      std::vector<float> scores(together * score_room), total(together * room);
      const T* a[8];
      const float* from[8];
      float* into[8];
      for (int64_t i = 0; i < together; i++) from[i] = &scores[i * score_room], into[i] = &total[i * room];
      for (int64_t at = begin; at < end; at++) {
        int64_t part = at % parts, kv = at / parts % kv_heads, query = at / parts / kv_heads, row = query / length;
        int64_t count = std::min(together, group - part * together);
        int64_t head = query * heads + kv * group + part * together;
        int64_t last = std::max<int64_t>(at_position[query], 0) + 1;
        int64_t first = window ? std::max<int64_t>(0, last - *window) : 0, n = last - first;
        const T* keys = data<T>(k) + row * k.stride(0) + kv * k.stride(2) + first * k.stride(1);
        const T* values = data<T>(v) + row * v.stride(0) + kv * v.stride(2) + first * v.stride(1);
        for (int64_t i = 0; i < count; i++) a[i] = data<T>(q) + (head + i) * width;
        for (int64_t s = 0; s < n; s += BLOCK) {
          ahead(values + s * v.stride(1), v.stride(1), std::min(BLOCK, n - s), value_width);
          dots(a, count, keys + s * k.stride(1), k.stride(1), std::min(BLOCK, n - s), width, &scores[s], score_room);
        }
        for (int64_t i = 0; i < count; i++) softmax(&scores[i * score_room], n, float(scale));
        std::fill(total.begin(), total.end(), 0.0f);
        mix(from, count, values, v.stride(1), n, value_width, into);
        for (int64_t i = 0; i < count; i++) finish(into[i], data<T>(y) + (head + i) * value_width, value_width);
      }
    });
  });
  return y;
}

// new [B,T,K,hd] -> its slots of store [rows,slots,K,hd] (any strides but the last); position -1: the last slot.
void remember(const Tensor& store, const Tensor& fresh, const Tensor& positions) {
  TORCH_CHECK(fresh.stride(3) == 1 && store.stride(3) == 1 && store.scalar_type() == fresh.scalar_type(), "remember: types");
  TORCH_CHECK(store.size(0) >= fresh.size(0) && store.size(2) == fresh.size(2) && store.size(3) == fresh.size(3), "remember: shapes");
  int64_t slots = store.size(1), heads = fresh.size(2), bytes = fresh.size(3) * fresh.element_size();
  Tensor where = positions.to(at::kLong).contiguous();
  char *to = data<char>(store), *from = data<char>(fresh);
  auto offset = [](const Tensor& t, int64_t i, int64_t j, int64_t k) {
    return (i * t.stride(0) + j * t.stride(1) + k * t.stride(2)) * t.element_size();
  };
  for (int64_t b = 0; b < fresh.size(0); b++)
    for (int64_t t = 0; t < fresh.size(1); t++) {
      int64_t slot = where.data_ptr<int64_t>()[b * fresh.size(1) + t];
      TORCH_CHECK(slot >= -1 && slot < slots, "remember: position past the slots");
      for (int64_t h = 0; h < heads; h++)
        std::memcpy(to + offset(store, b, slot < 0 ? slots - 1 : slot, h), from + offset(fresh, b, t, h), bytes);
    }
}

// -------------------------------------------------------------------------------- experts and gates
inline Floats silu(Floats x) { return x / (1.0f + exponential(-x)); }

// x [N,2F], gates then ups -> silu(gate) * up [N,F]
Tensor silu_mul(const Tensor& x_) {
  Tensor x = x_.contiguous();
  auto shape = x.sizes().vec();
  int64_t width = shape.back() /= 2, rows = x.numel() / (2 * width);
  Tensor y = at::empty(shape, x.options());
  by_type(x, [&](auto tag) {
    using T = decltype(tag);
    spread(rows, 2 * width * sizeof(T), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row++) {
        const T* gate = data<T>(x) + row * 2 * width;
        Floats g[Pack<T>::parts], u[Pack<T>::parts];
        for (int64_t k = 0; k < width; k += Pack<T>::size) {
          widen(load(gate + k, width - k), g), widen(load(gate + width + k, width - k), u);
          for (int j = 0; j < Pack<T>::parts; j++) g[j] = silu(g[j]) * u[j];
          store(g, data<T>(y) + row * width + k, width - k);
        }
      }
    });
  });
  return y;
}

// x [N,D], router [E,D], bias [E] in fp32 -> scores [N,E] in fp32, chosen [N,k] best first, gates [N,k].
std::tuple<Tensor, Tensor, Tensor> route(const Tensor& x_, const Tensor& router, const optional<Tensor>& bias,
                                         int64_t top_k, bool softmax_scores, bool norm, double scale) {
  Tensor x = x_.contiguous();
  int64_t n = x.size(0), width = x.size(1), number = router.size(0), room = whole(number, BLOCK);
  TORCH_CHECK(router.is_contiguous() && router.size(1) == width && router.scalar_type() == x.scalar_type(), "route: router");
  TORCH_CHECK(!bias || (bias->scalar_type() == at::kFloat && bias->numel() == number), "route: bias");
  TORCH_CHECK(top_k <= number, "route: more choices than experts");
  Tensor scores = at::empty({n, number}, x.options().dtype(at::kFloat));
  Tensor chosen = at::empty({n, top_k}, x.options().dtype(at::kLong)), gates = at::empty({n, top_k}, x.options());
  const float* add = bias ? data<float>(*bias) : nullptr;
  by_type(x, [&](auto tag) {
    using T = decltype(tag);
    spread(n, number * width * sizeof(T), [&](int64_t begin, int64_t end) {
      std::vector<float> s(room), ranked(number);
      for (int64_t row = begin; row < end; row++) {
        const T* a = data<T>(x) + row * width;
        for (int64_t e = 0; e < number; e += BLOCK)
          dots(&a, 1, data<T>(router) + e * width, width, std::min(BLOCK, number - e), width, &s[e], room);
        if (softmax_scores)
          softmax(s.data(), number, 1.0f);
        else
          for (int64_t e = 0; e < number; e++) s[e] = 1.0f / (1.0f + std::exp(-s[e]));
        std::memcpy(data<float>(scores) + row * number, s.data(), number * sizeof(float));
        for (int64_t e = 0; e < number; e++) ranked[e] = s[e] + (add ? add[e] : 0.0f);
        int64_t* mine = data<int64_t>(chosen) + row * top_k;
        float total = 0;
        for (int64_t c = 0; c < top_k; c++) {
          mine[c] = std::max_element(ranked.begin(), ranked.end()) - ranked.begin();
          ranked[mine[c]] = -INFINITY;
          total += s[mine[c]];
        }
        for (int64_t c = 0; c < top_k; c++)
          put(s[mine[c]] / (norm ? total + 1e-20f : 1.0f) * float(scale), data<T>(gates) + row * top_k + c);
      }
    });
  });
  return {scores, chosen, gates};
}

// x [N,D], chosen [N,k] experts, gates [N,k], gate_up [E,2,F,D], down [E,F,D] -> [N,D]
// Only the rows of chosen experts are read, each once for all of its tokens.
Tensor experts(const Tensor& x_, const Tensor& chosen, const Tensor& gates_, const Tensor& gate_up, const Tensor& down) {
  Tensor x = x_.contiguous(), gates = gates_.contiguous();
  int64_t n = x.size(0), width = x.size(1), top = chosen.size(1), number = gate_up.size(0), hidden = gate_up.size(2);
  TORCH_CHECK(gate_up.is_contiguous() && down.is_contiguous(), "experts: strides");
  TORCH_CHECK(x.scalar_type() == gate_up.scalar_type() && x.scalar_type() == down.scalar_type() && x.scalar_type() == gates.scalar_type(), "experts: types");
  TORCH_CHECK(gate_up.size(3) == width && down.size(0) == number && down.size(1) == hidden && down.size(2) == width, "experts: shapes");
  Tensor picked = chosen.contiguous(), y = at::empty(x.sizes(), x.options());
  const int64_t* expert = picked.data_ptr<int64_t>();
  std::vector<std::vector<int64_t>> pairs(number);  // (token, choice) pairs of each expert
  std::vector<int64_t> met;
  for (int64_t i = 0; i < n * top; i++) {
    TORCH_CHECK(expert[i] >= 0 && expert[i] < number, "experts: no such expert");
    if (pairs[expert[i]].empty()) met.push_back(expert[i]);
    pairs[expert[i]].push_back(i);
  }
  by_type(x, [&](auto tag) {
    using T = decltype(tag);
    constexpr int64_t PIECE = 128;  // numbers of D that one task of the second product makes
    int64_t blocks = (hidden + BLOCK - 1) / BLOCK, pieces = (width + PIECE - 1) / PIECE;
    std::vector<float> h(n * top * blocks * BLOCK), out(n * top * pieces * PIECE);
    spread(met.size() * blocks, 2 * BLOCK * width * sizeof(T), [&](int64_t begin, int64_t end) {
      std::vector<const T*> a(n);
      std::vector<float> gate(n * BLOCK), up(n * BLOCK);
      for (int64_t at = begin; at < end; at++) {
        const auto& mine = pairs[met[at / blocks]];
        int64_t count = mine.size(), start = at % blocks * BLOCK, rows = std::min(BLOCK, hidden - start);
        const T* w = data<T>(gate_up) + (met[at / blocks] * 2 * hidden + start) * width;
        for (int64_t i = 0; i < count; i++) a[i] = data<T>(x) + mine[i] / top * width;
        dots(a.data(), count, w, width, rows, width, gate.data(), BLOCK);
        dots(a.data(), count, w + hidden * width, width, rows, width, up.data(), BLOCK);
        for (int64_t i = 0; i < count; i++)
          for (int64_t r = 0; r < BLOCK; r += LANES) {
            Floats g, u;
            std::memcpy(&g, &gate[i * BLOCK + r], sizeof g), std::memcpy(&u, &up[i * BLOCK + r], sizeof u);
            g = silu(g) * u * get(data<T>(gates) + mine[i]);
            std::memcpy(&h[mine[i] * blocks * BLOCK + start + r], &g, sizeof g);
          }
      }
    });
    spread(met.size() * pieces, hidden * PIECE * sizeof(T), [&](int64_t begin, int64_t end) {
      std::vector<const float*> from(n);
      std::vector<float*> into(n);
      for (int64_t at = begin; at < end; at++) {
        const auto& mine = pairs[met[at / pieces]];
        int64_t count = mine.size(), start = at % pieces * PIECE;
        for (int64_t i = 0; i < count; i++)
          from[i] = &h[mine[i] * blocks * BLOCK], into[i] = &out[mine[i] * pieces * PIECE + start];
        const T* w = data<T>(down) + met[at / pieces] * hidden * width + start;
        mix(from.data(), count, w, width, hidden, std::min(PIECE, width - start), into.data());
      }
    });
    for (int64_t i = 0; i < n; i++) {
      float* total = &out[i * top * pieces * PIECE];
      for (int64_t c = 1; c < top; c++)
        for (int64_t k = 0; k < pieces * PIECE; k++) total[k] += total[c * pieces * PIECE + k];
      finish(total, data<T>(y) + i * width, width);
    }
  });
  return y;
}

// ---------------------------------------------------------------------------- norms and rotations
// x [...,D], weight [D]; `centred`: the weight is 1 + what is stored.
Tensor rms_norm(const Tensor& x_, const Tensor& weight, double eps, bool centred) {
  Tensor x = x_.contiguous(), y = at::empty(x.sizes(), x.options());
  int64_t width = x.size(-1), rows = x.numel() / width;
  TORCH_CHECK(weight.numel() == width && weight.scalar_type() == x.scalar_type(), "rms_norm: weight");
  by_type(x, [&](auto tag) {
    using T = decltype(tag);
    constexpr int parts = Pack<T>::parts, size = Pack<T>::size;
    spread(rows, width * sizeof(T), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row++) {
        const T* from = data<T>(x) + row * width;
        Floats squares = {}, v[parts], w[parts];
        for (int64_t k = 0; k < width; k += size) {
          widen(load(from + k, width - k), v);
          for (int j = 0; j < parts; j++) squares += v[j] * v[j];
        }
        float scale = 1.0f / std::sqrt(sum(squares) / width + float(eps));
        for (int64_t k = 0; k < width; k += size) {
          widen(load(from + k, width - k), v), widen(load(data<T>(weight) + k, width - k), w);
          for (int j = 0; j < parts; j++) v[j] = v[j] * scale * (w[j] + (centred ? 1.0f : 0.0f));
          store(v, data<T>(y) + row * width + k, width - k);
        }
      }
    });
  });
  return y;
}

// x [B,T,heads,hd], of which the first `dims` are turned; cos, sin [B or 1,T,dims/2] in fp32 -> [B,T,heads,hd]
Tensor rotate(const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved) {
  TORCH_CHECK(x.stride(3) == 1 && cos.is_contiguous() && sin.is_contiguous() && cos.scalar_type() == at::kFloat, "rotate: strides");
  int64_t length = x.size(1), heads = x.size(2), width = x.size(3), half = cos.size(2);
  TORCH_CHECK(2 * half <= width && cos.size(1) == length && (cos.size(0) == 1 || cos.size(0) == x.size(0)), "rotate: shapes");
  Tensor y = at::empty(x.sizes(), x.options());
  by_type(x, [&](auto tag) {
    using T = decltype(tag);
    spread(x.size(0) * length, heads * width * sizeof(T), [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; token++) {
        int64_t b = token / length, t = token % length, turn = ((cos.size(0) == 1 ? 0 : b) * length + t) * half;
        const float *c = data<float>(cos) + turn, *s = data<float>(sin) + turn;
        int64_t apart = interleaved ? 1 : half, step = interleaved ? 2 : 1;
        for (int64_t h = 0; h < heads; h++) {
          const T* from = data<T>(x) + b * x.stride(0) + t * x.stride(1) + h * x.stride(2);
          T* to = data<T>(y) + (token * heads + h) * width;
          for (int64_t i = 0; i < half; i++) {
            float p = get(from + i * step), q = get(from + i * step + apart);
            put(p * c[i] - q * s[i], to + i * step), put(q * c[i] + p * s[i], to + i * step + apart);
          }
          std::memcpy(to + 2 * half, from + 2 * half, (width - 2 * half) * sizeof(T));
        }
      }
    });
  });
  return y;
}

// Parts of a layer in one call each: between the kernels Python takes as long as a small kernel does.
Tensor swiglu(const Tensor& x, const Tensor& gate_up, const Tensor& down) {
  return linear(silu_mul(linear(x, gate_up, {})), down, {});
}

Tensor heads(const Tensor& x, const Tensor& weight, const optional<Tensor>& bias, int64_t width, const optional<Tensor>& norm,
             double eps, bool centred, const Tensor& cos, const Tensor& sin, bool interleaved) {
  Tensor y = linear(x, weight, bias);
  if (norm && norm->numel() != width) y = rms_norm(y, *norm, eps, centred);
  y = y.view({x.size(0), x.size(1), -1, width});
  if (norm && norm->numel() == width) y = rms_norm(y, *norm, eps, centred);
  return cos.size(-1) ? rotate(y, cos, sin, interleaved) : y;
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using free = py::call_guard<py::gil_scoped_release>;
  m.def("linear", &linear, free());
  m.def("per_head", &per_head, free());
  m.def("attend", &attend, free());
  m.def("remember", &remember, free());
  m.def("silu_mul", &silu_mul, free());
  m.def("route", &route, free());
  m.def("experts", &experts, free());
  m.def("rms_norm", &rms_norm, free());
  m.def("rotate", &rotate, free());
  m.def("swiglu", &swiglu, free());
  m.def("heads", &heads, free());
}
