// Launching a kernel: on the GPU, or in the emulator.
#pragma once
#include <stdexcept>
#include <string>

#include "copy.h"
#if SK_GPU
#include <cuda.h>
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <utility>
#endif

namespace sk::device {

struct Shape {
    unsigned grid, cluster, threads;
    size_t shared_bytes;
};

#if SK_GPU
inline void must(cudaError_t status, const char* what) {
    if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

template <class... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), const Shape& shape, uint64_t stream,
            const std::type_identity_t<Parameters>&... arguments) {
    int device = 0;
    must(cudaGetDevice(&device), name);
    static std::mutex mutex;
    static std::map<std::pair<const void*, int>, size_t> ready;  // how much shared memory was asked for
    const std::pair<const void*, int> key{reinterpret_cast<const void*>(kernel), device};
    if (const std::lock_guard lock(mutex); ready[key] < shape.shared_bytes) {
        must(cudaFuncSetAttribute(key.first, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(shape.shared_bytes)),
             name);
        ready[key] = shape.shared_bytes;
    }
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {shape.cluster, 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = {shape.grid, 1, 1};
    config.blockDim = {shape.threads, 1, 1};
    config.dynamicSmemBytes = shape.shared_bytes;
    config.stream = reinterpret_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = shape.cluster > 1 ? 1 : 0;
    must(cudaLaunchKernelEx(&config, kernel, arguments...), name);
}

// The map of a matrix of `rows` rows of `columns` elements, `stride` elements from row to row, in boxes of 128 bytes.
inline TensorMap tensor_map(const void* data, Type type, int64_t columns, int64_t rows, int64_t stride, int box_rows) {
    using Encode = decltype(&cuTensorMapEncodeTiled);
    static const Encode encode = [] {
        void* entry = nullptr;
        cudaDriverEntryPointQueryResult found;
        must(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found),
             "cuTensorMapEncodeTiled");
        return reinterpret_cast<Encode>(entry);
    }();
    const int bytes = bytes_of(type);
    const CUtensorMapDataType types[] = {CU_TENSOR_MAP_DATA_TYPE_FLOAT32, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                                         CU_TENSOR_MAP_DATA_TYPE_FLOAT16, CU_TENSOR_MAP_DATA_TYPE_UINT8,
                                         CU_TENSOR_MAP_DATA_TYPE_UINT8,   CU_TENSOR_MAP_DATA_TYPE_INT32};
    const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
    const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride * bytes)};
    const cuuint32_t box[2] = {static_cast<cuuint32_t>(128 / bytes), static_cast<cuuint32_t>(box_rows)};
    const cuuint32_t steps[2] = {1, 1};
    static_assert(sizeof(TensorMap) == sizeof(CUtensorMap));
    TensorMap map;
    const CUresult status =
        encode(reinterpret_cast<CUtensorMap*>(&map), types[static_cast<int>(type)], 2, const_cast<void*>(data), sizes,
               strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS) {
        throw std::runtime_error("cuTensorMapEncodeTiled refuses a matrix of " + std::to_string(rows) + " x " +
                                 std::to_string(columns) + " with stride " + std::to_string(stride) + " (error " +
                                 std::to_string(status) + ")");
    }
    return map;
}
#else
template <class... Parameters>
void launch(const char*, void (*kernel)(Parameters...), const Shape& shape, uint64_t,
            const std::type_identity_t<Parameters>&... arguments) {
    emu::launch({shape.grid, 1, 1}, shape.cluster, shape.threads, shape.shared_bytes, [&] { kernel(arguments...); });
}

inline TensorMap tensor_map(const void* data, Type type, int64_t columns, int64_t rows, int64_t stride, int box_rows) {
    const int64_t bytes = bytes_of(type);
    if (reinterpret_cast<uintptr_t>(data) % 16 || stride * bytes % 16) {
        throw std::runtime_error("a tensor map needs an address and a stride that 16 bytes divide");
    }
    return {static_cast<const char*>(data), static_cast<uint64_t>(columns * bytes), static_cast<uint64_t>(rows),
            static_cast<uint64_t>(stride * bytes), static_cast<uint32_t>(box_rows)};
}
#endif

}  // namespace sk::device
