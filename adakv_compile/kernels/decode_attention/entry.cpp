// The way from PyTorch's dispatcher to the kernel in native.cpp, for a step's usual arguments without any Python: these
// are called once a layer and token, and a model's weights have pushed the interpreter out of the caches by then.
// Whatever is unusual, wrong arguments included, goes to the overload "cpu", which is written in Python.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <optional>

namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;
using Kernel = int (*)(const int64_t*, const double*, void* const*);
using Signature = Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                         const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Maybe&, const Maybe&,
                         const Maybe&, double, std::optional<int64_t>, std::optional<double>);

Kernel kernel = nullptr;

bool is_like(const Tensor& t, at::ScalarType dtype, std::initializer_list<int64_t> sizes) {
  return t.is_cpu() && t.scalar_type() == dtype && t.sizes() == at::IntArrayRef(sizes);
}

bool is_stored(const Tensor& t, at::ScalarType dtype, std::initializer_list<int64_t> sizes) {
  return is_like(t, dtype, sizes) && t.is_contiguous();
}

// Whether `padding` is given for all of the text and hides none of it.
bool hides_nothing(const Tensor& padding, int64_t batch, int64_t length) {
  if (!padding.is_cpu() || padding.scalar_type() != at::kBool || padding.dim() != 2 || !padding.is_contiguous())
    return false;
  if ((padding.size(0) != 1 && padding.size(0) != batch) || padding.size(1) < length) return false;
  const bool* real = padding.const_data_ptr<bool>();
  return std::find(real, real + padding.numel(), false) == real + padding.numel();
}

int dtype_code(at::ScalarType dtype) {
  // As native.cpp counts them.
  return dtype == at::kFloat ? 0 : dtype == at::kBFloat16 ? 1 : dtype == at::kHalf ? 2 : -1;
}

// Returns an undefined tensor where the arguments are not the usual ones; nothing was done then.
Tensor usual(const Tensor& query, const Tensor& key_new, const Tensor& value_new, const Tensor& keys,
             const Tensor& values, const Tensor& offsets, const Tensor& positions, const Tensor& tail_keys,
             const Tensor& tail_values, const Tensor& cursor, const Maybe& mask, const Maybe& padding,
             const Maybe& sinks, double scale, std::optional<int64_t> window, std::optional<double> softcap) {
  const auto dtype = query.scalar_type();
  const int code = dtype_code(dtype);
  if (mask || code < 0 || !query.is_cpu() || query.dim() != 4 || query.size(2) != 1 || keys.dim() != 3) return {};
  if (tail_values.dim() != 4 || cursor.dim() != 1 || cursor.size(0) < 2 || cursor.scalar_type() != at::kInt) return {};
  const int64_t batch = query.size(0), query_heads = query.size(1), key_dim = query.size(3), slots = keys.size(1);
  const int64_t heads = tail_values.size(1), capacity = tail_values.size(2), value_dim = tail_values.size(3);
  if (heads == 0 || query_heads % heads != 0 || (softcap && !(*softcap > 0 && std::isfinite(*softcap)))) return {};
  if (!is_like(key_new, dtype, {batch, heads, 1, key_dim}) || !is_like(value_new, dtype, {batch, heads, 1, value_dim}) ||
      !is_stored(keys, dtype, {batch, slots, key_dim}) || !is_stored(values, dtype, {batch, slots, value_dim}) ||
      !is_stored(offsets, at::kInt, {batch, heads + 1}) || !is_stored(positions, at::kInt, {batch, slots}) ||
      !is_stored(tail_keys, dtype, {batch, heads, capacity, key_dim}) ||
      !is_stored(tail_values, dtype, {batch, heads, capacity, value_dim}) || !cursor.is_cpu() || !cursor.is_contiguous())
    return {};
  if (sinks && !is_stored(*sinks, at::kFloat, {query_heads})) return {};
  const int32_t* used = cursor.const_data_ptr<int32_t>();
  if (padding && !hides_nothing(*padding, batch, int64_t(used[0]) + used[1] + 1)) return {};
  if (used[0] >= capacity) return {};

  Tensor out = at::empty({batch, query_heads, 1, value_dim}, query.options());
  const auto q = query.strides(), k = key_new.strides(), v = value_new.strides();
  // The orders are those of native.py.
  const int64_t numbers[] = {batch, heads, query_heads / heads, key_dim, value_dim, slots, capacity, window.value_or(0),
                             code, at::get_num_threads(), q[0], q[1], q[3], k[0], k[1], k[3], v[0], v[1], v[3]};
  const double factors[] = {scale, softcap.value_or(0.0)};
  void* const pointers[] = {query.data_ptr(), key_new.data_ptr(), value_new.data_ptr(), keys.data_ptr(),
                            values.data_ptr(), offsets.data_ptr(), positions.data_ptr(), tail_keys.data_ptr(),
                            tail_values.data_ptr(), cursor.data_ptr(), nullptr, nullptr,
                            sinks ? sinks->data_ptr() : nullptr, out.data_ptr()};
  return kernel(numbers, factors, pointers) ? Tensor() : out;
}

Tensor decode(const Tensor& query, const Tensor& key_new, const Tensor& value_new, const Tensor& keys,
              const Tensor& values, const Tensor& offsets, const Tensor& positions, const Tensor& tail_keys,
              const Tensor& tail_values, const Tensor& cursor, const Maybe& mask, const Maybe& padding,
              const Maybe& sinks, double scale, std::optional<int64_t> window, std::optional<double> softcap) {
  Tensor out = usual(query, key_new, value_new, keys, values, offsets, positions, tail_keys, tail_values, cursor, mask,
                     padding, sinks, scale, window, softcap);
  if (out.defined()) return out;
  static const auto general =
      c10::Dispatcher::singleton().findSchemaOrThrow("adakv::decode_attention_v2", "cpu").typed<Signature>();
  return general.call(query, key_new, value_new, keys, values, offsets, positions, tail_keys, tail_values, cursor, mask,
                      padding, sinks, scale, window, softcap);
}

}  // namespace

// Registers for CPUs; once.
extern "C" void adakv_register(void* decode_attention) {
  kernel = reinterpret_cast<Kernel>(decode_attention);
  static torch::Library library(torch::Library::IMPL, "adakv", c10::DispatchKey::CPU, __FILE__, __LINE__);
  library.impl("decode_attention_v2", &decode);
}
