// Launching a kernel: on the GPU, or in the emulator.
#pragma once
#include <stdexcept>
#include <string>

#include "copy.h"
#include "images.h"
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
    if (status == cudaSuccess) return;
    std::string why = cudaGetErrorString(status);
    if (status == cudaErrorInsufficientDriver || status == cudaErrorStubLibrary) {
        int found = 0;  // stays 0 where there is no driver at all, which the runtime calls insufficient, too
        cudaDriverGetVersion(&found);
        const auto name = [](int version) {
            return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
        };
        why = "this needs an NVIDIA driver for CUDA " + name(CUDART_VERSION) + ", and " +
              (found ? "the one here is for CUDA " + name(found) : "there is none here");
    }
    throw std::runtime_error(std::string(what) + ": " + why);
}

// What a launch of this shape asks of the runtime.
struct Launch {
    cudaLaunchConfig_t config{};
    cudaLaunchAttribute attribute{};

    Launch(const char* name, const void* kernel, const Shape& shape, uint64_t stream) {
        allow_shared(name, kernel, shape.shared_bytes);
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim = {shape.cluster, 1, 1};
        config.gridDim = {shape.grid, 1, 1};
        config.blockDim = {shape.threads, 1, 1};
        config.dynamicSmemBytes = shape.shared_bytes;
        config.stream = reinterpret_cast<cudaStream_t>(stream);
        config.attrs = &attribute;
        config.numAttrs = shape.cluster > 1 ? 1 : 0;
    }
    Launch(const Launch&) = delete;  // config points into it

    // More than the usual 48 KB of shared memory, which a kernel is allowed once on each device.
    static void allow_shared(const char* name, const void* kernel, size_t bytes) {
        int device = 0;
        must(cudaGetDevice(&device), name);
        static std::mutex mutex;
        static std::map<std::pair<const void*, int>, size_t> allowed;
        const std::lock_guard lock(mutex);
        size_t& most = allowed[{kernel, device}];
        if (most >= bytes) return;
        must(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)), name);
        most = bytes;
    }
};

template <class... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), const Shape& shape, uint64_t stream,
            const std::type_identity_t<Parameters>&... arguments) {
    const Launch asked(name, reinterpret_cast<const void*>(kernel), shape, stream);
    must(cudaLaunchKernelEx(&asked.config, kernel, arguments...), name);
}

// How many clusters of this kernel are on the current device at once: a cluster's blocks lie in one GPC, and a GPC of
// 18 multiprocessors has room for four clusters of four. 0: the device cannot run it.
template <class... Parameters>
int resident_clusters(const char* name, void (*kernel)(Parameters...), const Shape& shape) {
    Launch asked(name, reinterpret_cast<const void*>(kernel), shape, 0);
    asked.config.numAttrs = 1;  // it wants to be told of clusters of one, too
    int clusters = 0;
    must(cudaOccupancyMaxActiveClusters(&clusters, reinterpret_cast<const void*>(kernel), &asked.config), name);
    return clusters;
}

// A function of the driver in the form that it has since CUDA 12.0.
template <class F>
F driver_function(const char* name) {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    must(cudaGetDriverEntryPointByVersion(name, &entry, 12000, cudaEnableDefault, &found), name);
    if (found != cudaDriverEntryPointSuccess || entry == nullptr) {
        throw std::runtime_error(std::string(name) + ": this needs an NVIDIA driver for CUDA 12.0 or later, " +
                                 "and the one here has no such function");
    }
    return reinterpret_cast<F>(entry);
}

inline CUtensorMapDataType map_type(Type type) {
    constexpr CUtensorMapDataType types[] = {CU_TENSOR_MAP_DATA_TYPE_FLOAT32, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                                             CU_TENSOR_MAP_DATA_TYPE_FLOAT16, CU_TENSOR_MAP_DATA_TYPE_UINT8,
                                             CU_TENSOR_MAP_DATA_TYPE_UINT8,   CU_TENSOR_MAP_DATA_TYPE_INT32};
    return types[static_cast<int>(type)];
}

// The map of a matrix of `rows` rows of `columns` elements, `stride` elements from row to row, in boxes of 128 bytes.
inline TensorMap tensor_map(const void* data, Type type, int64_t columns, int64_t rows, int64_t stride, int box_rows) {
    static const auto encode = driver_function<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
    const int bytes = bytes_of(type);
    const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
    const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride * bytes)};
    const cuuint32_t box[2] = {static_cast<cuuint32_t>(128 / bytes), static_cast<cuuint32_t>(box_rows)};
    const cuuint32_t steps[2] = {1, 1};
    static_assert(sizeof(TensorMap) == sizeof(CUtensorMap));
    TensorMap map;
    const CUresult status =
        encode(reinterpret_cast<CUtensorMap*>(&map), map_type(type), 2, const_cast<void*>(data), sizes, strides, box,
               steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS) {
        throw std::runtime_error("cuTensorMapEncodeTiled refuses a matrix of " + std::to_string(rows) + " x " +
                                 std::to_string(columns) + " with stride " + std::to_string(stride) + " (error " +
                                 std::to_string(status) + ")");
    }
    return map;
}

// The map of `count` images in boxes of `box_pixels` pixels and 128 bytes of channels, `stride` elements from pixel to
// pixel. The driver takes corners (the beginnings of the first window, and of the last relative to the last pixel) from
// -128 to 127 and strides up to 8. It wants every dimension in the order channel, width, height, image.
inline TensorMap image_map(const void* data, Type type, const Images& g, int64_t count, int64_t stride,
                           int box_pixels) {
    static const auto encode = driver_function<decltype(&cuTensorMapEncodeIm2col)>("cuTensorMapEncodeIm2col");
    const int bytes = bytes_of(type);
    const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(g.channels), static_cast<cuuint64_t>(g.width),
                                 static_cast<cuuint64_t>(g.height), static_cast<cuuint64_t>(count)};
    const auto pixel = static_cast<cuuint64_t>(stride * bytes);
    const cuuint64_t strides[3] = {pixel, pixel * sizes[1], pixel * sizes[1] * sizes[2]};
    const int lower[2] = {-g.left, -g.top};
    const int upper[2] = {(g.out_w - 1) * g.stride_w - g.left - (g.width - 1),
                          (g.out_h - 1) * g.stride_h - g.top - (g.height - 1)};
    const cuuint32_t steps[4] = {1, static_cast<cuuint32_t>(g.stride_w), static_cast<cuuint32_t>(g.stride_h), 1};
    TensorMap map;
    const CUresult status = encode(
        reinterpret_cast<CUtensorMap*>(&map), map_type(type), 4, const_cast<void*>(data), sizes, strides, lower, upper,
        static_cast<cuuint32_t>(128 / bytes), static_cast<cuuint32_t>(box_pixels), steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS) {
        throw std::runtime_error("cuTensorMapEncodeIm2col refuses " + std::to_string(count) + " images of " +
                                 std::to_string(g.height) + " x " + std::to_string(g.width) + " pixels, " +
                                 std::to_string(g.channels) + " channels (error " + std::to_string(status) + ")");
    }
    return map;
}
#else
template <class... Parameters>
void launch(const char*, void (*kernel)(Parameters...), const Shape& shape, uint64_t,
            const std::type_identity_t<Parameters>&... arguments) {
    emu::launch({shape.grid, 1, 1}, shape.cluster, shape.threads, shape.shared_bytes, [&] { kernel(arguments...); });
}

// What a device would say is decided by sparsekern/sp24/config.py where there is none.
template <class... Parameters>
int resident_clusters(const char* name, void (*)(Parameters...), const Shape&) {
    throw std::runtime_error(std::string(name) + ": the emulator has no multiprocessors to count clusters on");
}

inline TensorMap tensor_map(const void* data, Type type, int64_t columns, int64_t rows, int64_t stride, int box_rows) {
    const int64_t bytes = bytes_of(type);
    if (reinterpret_cast<uintptr_t>(data) % 16 || stride * bytes % 16) {
        throw std::runtime_error("a tensor map needs an address and a stride that 16 bytes divide");
    }
    if (stride < columns) throw std::runtime_error("the rows of a tensor map do not overlap");
    return {static_cast<const char*>(data), static_cast<uint64_t>(columns * bytes), static_cast<uint64_t>(rows),
            static_cast<uint64_t>(stride * bytes), static_cast<uint32_t>(box_rows)};
}

inline TensorMap image_map(const void* data, Type type, const Images& g, int64_t count, int64_t stride,
                           int box_pixels) {
    TensorMap map = tensor_map(data, type, g.channels, count * g.height * g.width, stride, box_pixels);
    map.height = g.height;
    map.width = g.width;
    map.first_h = -g.top;
    map.first_w = -g.left;
    map.step_h = g.stride_h;
    map.step_w = g.stride_w;
    map.last_h = map.first_h + (g.out_h - 1) * g.stride_h;
    map.last_w = map.first_w + (g.out_w - 1) * g.stride_w;
    for (int corner : {map.first_h, map.first_w, map.last_h - (g.height - 1), map.last_w - (g.width - 1)}) {
        if (corner < -128 || corner > 127) throw std::runtime_error("a map of images has corners from -128 to 127");
    }
    if (g.stride_h > 8 || g.stride_w > 8) throw std::runtime_error("a map of images has strides up to 8");
    return map;
}
#endif

}  // namespace sk::device
