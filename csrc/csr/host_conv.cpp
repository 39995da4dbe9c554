// Pruned-weight convolution for one instruction set (see core/isa.h): no im2col of the image. Per task (some lines of
// an image, or some small images) the input goes once into zero-padded planes (conv_grid.h), L2-resident; per tile of
// columns and strip of pixels the taps are copied to an aligned panel in the first cache, because an unaligned load
// costs two and every stored value of every output channel reads from it; accumulators of all channels wait in L2.
#include "conv_grid.h"

SK_ISA_BEGIN
namespace {

// Who owns which scratch slot. The first three belong to the calling thread and are read by all.
enum Slot { kValues, kTables, kSums, kPlanes, kPanel, kAcc, kPieces, kOffsets };

constexpr int64_t kThreadingWork = 1'500'000;  // multiply-adds below which waking a thread costs more than it saves
constexpr int64_t kCacheFloats = 300'000;      // planes and accumulators of one task: a little over half of a 2 MB L2

template <class T>
T* scratch_of(Slot slot, int64_t count) {
    return static_cast<T*>(scratch(slot, size_t(most(count, 1)) * sizeof(T)));
}

// One product on the grid: which planes its rows read, where its rows go, and how it is cut into tasks.
struct Engine {
    ConvGrid grid;
    ConvTaps taps;
    ConvTensor in, out;
    int64_t groups, group_channels, group_rows;  // channels of `in` and stream rows of one group
    const float* values;
    ConvStream weight;
    int64_t tiles;
    const ConvMap* maps;  // one per `map_rows` rows of a group
    int64_t map_rows;
    bool view;  // the planes are the tensor itself
    int64_t task_images, task_lines, image_tasks, line_tasks, row_tasks;
};

// The values as floats: in stream order for rows (tile 0), as they lie for blocks.
const float* float_values(const ConvStream& w, int threads) {
    const bool gather = w.gather && !w.tile;
    if (w.dtype == Dtype::f32 && !gather) return static_cast<const float*>(w.values);
    const int64_t count = gather ? w.stored : w.value_count;
    float* out = scratch_of<float>(kValues, count);
    constexpr int64_t kBlock = 1 << 15;
    parallel_for(ceil_div(count, kBlock), count < 4 * kBlock ? 1 : threads, [&](int64_t block) {
        const int64_t i0 = block * kBlock, i1 = least(i0 + kBlock, count);
        dispatch_float(w.dtype, [&]<Dtype T>() {
            if (gather)
                for (int64_t i = i0; i < i1; ++i) out[i] = load_as<T>(w.values, w.gather[i]);
            else
                copy_line<T>(static_cast<const char*>(w.values) + i0 * size_of(T), 1, i1 - i0, out + i0);
        });
    });
    return out;
}

// Small tables of one call, cut from a single scratch buffer.
struct Tables {
    int32_t *plane, *shift, *phase, *phase_index;
    ConvMap* maps;
    Tables(int64_t columns, int64_t phases) {
        char* p = static_cast<char*>(scratch(kTables, size_t(columns * 8 + phases * (8 + sizeof(ConvMap)) + 64)));
        maps = reinterpret_cast<ConvMap*>(p), p += phases * sizeof(ConvMap);
        plane = reinterpret_cast<int32_t*>(p), p += columns * 4;
        shift = reinterpret_cast<int32_t*>(p), p += columns * 4;
        phase = reinterpret_cast<int32_t*>(p), p += phases * 4;
        phase_index = reinterpret_cast<int32_t*>(p);
    }
};

// Forward geometry: tap (r, s) of output (i, j) reads padded input (i * stride + r * dilation, ...).
void forward_grid(const ConvGeometry& g, const ConvTensor& x, int64_t out_h, int64_t out_w, int64_t columns,
                  const Tables& tables, ConvGrid& grid, ConvTaps& taps) {
    grid.gh = out_h, grid.gw = out_w, grid.step_h = g.stride_h, grid.step_w = g.stride_w;
    grid.pad_h = g.pad_top, grid.pad_w = g.pad_left;
    grid.halo_h = (g.kh - 1) * g.dilation_h / g.stride_h, grid.halo_w = (g.kw - 1) * g.dilation_w / g.stride_w;
    for (int64_t p = 0; p < g.stride_h * g.stride_w; ++p) tables.phase_index[p] = -1;
    grid.phases = 0;
    for (int64_t r = 0; r < g.kh; ++r)
        for (int64_t s = 0; s < g.kw; ++s) {
            const int64_t p = r * g.dilation_h % g.stride_h * g.stride_w + s * g.dilation_w % g.stride_w;
            if (tables.phase_index[p] >= 0) continue;
            tables.phase[grid.phases] = int32_t(p);
            tables.phase_index[p] = int32_t(grid.phases++);
        }
    grid.phase = tables.phase;
    grid.finish(x.height, x.width);
    const int64_t channels = x.channels / g.groups, area = g.kh * g.kw;
    for (int64_t c = 0; c < channels; ++c)
        for (int64_t r = 0; r < g.kh; ++r)
            for (int64_t s = 0; s < g.kw; ++s) {
                const int64_t rs = r * g.kw + s, k = g.order == ConvOrder::crs ? c * area + rs : rs * channels + c;
                const int64_t y = r * g.dilation_h, z = s * g.dilation_w;
                const int64_t p = tables.phase_index[y % g.stride_h * g.stride_w + z % g.stride_w];
                tables.plane[k] = int32_t(c * grid.phases + p);
                tables.shift[k] = int32_t(y / g.stride_h * grid.pitch + z / g.stride_w);
            }
    for (int64_t k = channels * area; k < columns; ++k) tables.plane[k] = -1, tables.shift[k] = 0;
    taps = {tables.plane, tables.shift};
}

// How many images or lines a task takes: planes and accumulators of a task fit the second cache, and there are at
// least as many tasks as threads, of rows where there are not enough pixels. Returns the number of tasks.
int64_t partition(Engine& e, int threads) {
    const ConvGrid& g = e.grid;
    const int64_t per_pixel = (e.tiles > 1 ? e.group_rows : 0) + (e.view ? 0 : e.group_channels * g.phases);
    const int64_t longest = most(2 * kStrip, kCacheFloats / most(per_pixel, 1));
    const int64_t image = g.compact ? g.gh * g.gw : g.image_rows * g.pitch, images = e.in.images;
    const int64_t want = ceil_div(threads, e.groups);  // tasks per group
    int64_t image_tasks = images, line_tasks = 1;
    if (image <= longest && !e.view) {
        image_tasks = least(images, most(ceil_div(images * image, longest), want));
    } else {
        line_tasks = ceil_div(g.gh, most(1, longest / g.pitch));
    }
    if (image_tasks * line_tasks < want)  // pieces of less than a strip would cost more than they bring
        line_tasks = most(line_tasks, least(ceil_div(want, image_tasks), g.gh * g.pitch / kStrip));
    line_tasks = most(1, least(line_tasks, g.gh));
    e.task_images = ceil_div(images, image_tasks), e.task_lines = ceil_div(g.gh, line_tasks);
    e.image_tasks = ceil_div(images, e.task_images), e.line_tasks = ceil_div(g.gh, e.task_lines);
    e.row_tasks = most(1, least(ceil_div(want, e.image_tasks * e.line_tasks), e.group_rows / 16));
    return e.image_tasks * e.line_tasks * e.groups * e.row_tasks;
}

ConvTask task_at(const Engine& e, int64_t index) {
    ConvTask t;
    const int64_t chunk = ceil_div(ceil_div(e.group_rows, e.row_tasks), kBlockRows) * kBlockRows;
    t.row0 = index % e.row_tasks * chunk, index /= e.row_tasks;
    t.rows = most(0, least(chunk, e.group_rows - t.row0));
    t.group = index % e.groups, index /= e.groups;
    t.line = index % e.line_tasks * e.task_lines, index /= e.line_tasks;
    t.lines = least(e.task_lines, e.grid.gh - t.line);
    t.image = index * e.task_images;
    t.count = least(e.task_images, e.in.images - t.image);
    return t;
}

// The planes of one task and how its strips read them.
struct TaskInput {
    const Engine& e;
    const ConvTask& t;
    float *planes = nullptr, *panel = nullptr;
    int64_t* offsets = nullptr;
    int64_t size;

    // Only channels [c0, c1) of the group are needed.
    TaskInput(const Engine& engine, const ConvTask& task, int64_t c0, int64_t c1) : e(engine), t(task) {
        size = plane_size(e.grid, t);
        if (!e.view) {
            planes = scratch_of<float>(kPlanes, (c1 - c0) * e.grid.phases * size);
            const int64_t first = t.group * e.group_channels;
            PlaneLine* table = scratch_of<PlaneLine>(kPieces, e.grid.phases * plane_lines(e.grid, t));
            dispatch_float(e.in.dtype,
                           [&]<Dtype T>() { fill_planes<T>(e.grid, e.in, t, first + c0, first + c1, planes, table); });
            planes -= c0 * e.grid.phases * size;
        }
        if (e.weight.tile) {
            panel = scratch_of<float>(kPanel, least(e.weight.tile, e.weight.columns) * kStrip + kLanes);
        } else {
            offsets = scratch_of<int64_t>(kOffsets, e.weight.columns);
            for (int64_t k = 0; k < e.weight.columns; ++k) offsets[k] = e.taps.plane[k] * size + e.taps.shift[k];
        }
    }

    StripInput strip(int64_t tile, Strip s) const {
        const int64_t q = s.first * kLanes;
        if (!e.weight.tile) return {planes + q, 0, offsets};
        const int64_t k0 = tile * e.weight.tile, k1 = least(k0 + e.weight.tile, e.weight.columns);
        if (e.view) {
            const ConvTensor& x = e.in;
            const int64_t at = t.image * x.stride_b + t.group * e.group_channels * x.stride_c + t.line * x.stride_h + q;
            dispatch_float(x.dtype, [&]<Dtype T>() {
                pack_pixels<T>(static_cast<const char*>(x.data) + at * size_of(T), x.stride_c, e.group_channels,
                               t.lines * x.width - q, s.vectors, k0, k1, panel);
            });
        } else {
            const ConvGrid& g = e.grid;
            if (g.compact) {
                const int64_t image = g.image_rows * g.pitch;
                const ConvMap map{0, g.gh, 0, g.gw, -t.line * g.pitch - t.image * image, g.pitch, 1};
                Piece* pieces = scratch_of<Piece>(kPieces, kStrip);
                const int64_t count = make_pieces(g, t, map, image, q, s.vectors * kLanes, pieces);
                pack_pieces(e.taps, planes, size, pieces, count, s.vectors, k0, k1, panel);
            } else {
                pack_planes(e.taps, planes, size, q, s.vectors, k0, k1, panel);
            }
        }
        return {panel, s.vectors * kLanes, nullptr};
    }

    const int32_t* segment(int64_t tile) const {
        return e.weight.segment + tile * e.weight.rows + t.group * e.group_rows + t.row0;
    }
};

// Writes rows [row0, row1) of a task, whose sums begin at `sums`.
void write_rows(const Engine& e, const ConvTask& t, Strip s, int64_t row0, int64_t row1, const float* sums,
                const Epilogue& epilogue) {
    const int64_t width = s.vectors * kLanes;
    Piece* pieces = scratch_of<Piece>(kPieces, kStrip);
    for (int64_t row = row0; row < row1;) {
        const int64_t m = row / e.map_rows, stop = least(row1, (m + 1) * e.map_rows);
        const int64_t channel = t.group * e.map_rows + row - m * e.map_rows;
        const int64_t count = make_pieces(e.grid, t, e.maps[m], e.out.stride_b, s.first * kLanes, width, pieces);
        dispatch_float(e.out.dtype, [&]<Dtype T>() {
            char* y = static_cast<char*>(e.out.data) + channel * e.out.stride_c * size_of(T);
            dispatch_act(epilogue.act, [&]<Act A>() {
                write_strip<T, A>(sums, s.vectors, stop - row, pieces, count, epilogue_from(epilogue, channel), y,
                                  e.out.stride_c, e.maps[m].stride_j);
            });
        });
        sums += (stop - row) * width, row = stop;
    }
}

// One tile of a strip for rows [row0, row1) of a task's group.
void run_blocks(const Engine& e, const ConvTask& t, int64_t tile, Strip s, int64_t row0, int64_t row1,
                const float* panel, float* sums) {
    const ConvStream& w = e.weight;
    const int64_t per_group = ceil_div(e.group_rows, kBlockRows), width = s.vectors * kLanes;
    const int64_t at = (tile * e.groups + t.group) * per_group + row0 / kBlockRows;
    const int64_t blocks = ceil_div(row1 - row0, kBlockRows);
    const int lines = w.narrow ? int(least(8, w.stored / most(1, w.rows * e.tiles) / 16 + 2)) : 0;
    auto run = [&]<class Entry>(const Entry* entries) {
        const BlockRange<Entry> range{
            e.values, w.counts + 16 * at, w.base + kBlockRows * at, w.start + at, entries, blocks, lines};
        for (int v = 0; v < s.vectors; v += kBlockVectors) {
            const int vectors = s.vectors - v < kBlockVectors ? s.vectors - v : kBlockVectors;
            dispatch_strip<kBlockVectors>(vectors, [&]<int U>() {
                strip_blocks<U>(range, panel + v * kLanes, width, sums + v * kLanes, tile == 0);
            });
        }
    };
    w.narrow ? run(static_cast<const uint8_t*>(w.entries)) : run(static_cast<const int32_t*>(w.entries));
}

void run_task(const Engine& e, const ConvTask& t, const Epilogue& epilogue) {
    if (!t.rows) return;
    constexpr int64_t kWriteRows = 32;  // the last tile's sums are written while they are in the first cache
    const TaskInput input(e, t, 0, e.group_channels);
    const int64_t vectors = ceil_div(task_length(e.grid, t), kLanes), strips = strip_count(vectors);
    const int64_t rows = ceil_div(t.rows, kBlockRows) * kBlockRows, end = t.row0 + t.rows;
    const bool keep = e.tiles > 1, direct = !e.weight.tile;
    float* acc = scratch_of<float>(
        kAcc, (keep ? vectors * kLanes * rows : kStrip * most(direct ? rows : 0, kWriteRows)) + kLanes);
    for (int64_t tile = 0; tile < e.tiles; ++tile)
        for (int64_t i = 0; i < strips; ++i) {
            const Strip s = strip_of(vectors, i);
            const StripInput in = input.strip(tile, s);
            const int64_t width = s.vectors * kLanes;
            float* sums = keep ? acc + s.first * kLanes * rows : acc;
            if (direct) {
                dispatch_strip(s.vectors, [&]<int U>() {
                    strip_rows<U>(e.values, e.weight.col, input.segment(0), input.segment(1), t.rows, in, sums);
                });
                write_rows(e, t, s, t.row0, end, sums, epilogue);
            } else if (tile < e.tiles - 1) {
                run_blocks(e, t, tile, s, t.row0, end, in.base, sums);
            } else {
                for (int64_t row = t.row0; row < end; row += kWriteRows) {
                    const int64_t stop = least(row + kWriteRows, end);
                    float* part = keep ? sums + (row - t.row0) * width : sums;
                    run_blocks(e, t, tile, s, row, stop, in.base, part);
                    write_rows(e, t, s, row, stop, part, epilogue);
                }
            }
        }
}

// Whether strips should skip what lies between lines: packing short pieces must pay in the products saved.
bool worth_compacting(const Engine& e) {
    const int64_t uses = e.weight.stored / most(1, e.weight.columns * e.groups);
    return e.weight.tile && !e.view && 10 * e.grid.pitch * e.grid.image_rows > 11 * e.grid.gw * e.grid.gh &&
           (uses >= 16 || e.grid.gw >= kLanes);
}

int64_t tile_count(const ConvStream& w) { return w.tile ? most(1, ceil_div(w.columns, w.tile)) : 1; }

int limit_threads(const ConvStream& w, const ConvTensor& y, int threads) {
    const int64_t pixels = y.images * y.height * y.width;
    return w.stored && pixels < ceil_div(kThreadingWork, w.stored) ? 1 : threads;
}

bool empty(const ConvTensor& x) { return !x.images || !x.height || !x.width; }

Engine forward_engine(const ConvGeometry& g, const ConvTensor& x, const ConvTensor& y, const ConvStream& w,
                      const Tables& tables) {
    Engine e;
    e.in = x, e.out = y, e.weight = w;
    e.groups = g.groups, e.group_channels = x.channels / g.groups, e.group_rows = w.rows / g.groups;
    forward_grid(g, x, y.height, y.width, w.columns, tables, e.grid, e.taps);
    tables.maps[0] = {0, y.height, 0, y.width, 0, y.stride_h, y.stride_w};
    e.maps = tables.maps, e.map_rows = e.group_rows;
    e.tiles = tile_count(w);
    // A small image alone fills no strip; several make one through planes.
    e.view = w.tile && g.kh == 1 && g.kw == 1 && g.stride_h == 1 && g.stride_w == 1 && !g.pad_top && !g.pad_left &&
             x.height == y.height && x.width == y.width && x.stride_w == 1 && x.stride_h == x.width &&
             (x.images == 1 || x.height * x.width >= 2 * kStrip);
    e.grid.compact = worth_compacting(e);
    return e;
}

void conv_forward(const ConvForward& a) {
    if (empty(a.y) || !a.weight.rows) return;
    const int threads = limit_threads(a.weight, a.y, a.threads);
    const Tables tables(a.weight.columns, a.geometry.stride_h * a.geometry.stride_w);
    Engine e = forward_engine(a.geometry, a.x, a.y, a.weight, tables);
    e.values = float_values(a.weight, threads);
    parallel_for(partition(e, threads), threads, [&](int64_t index) { run_task(e, task_at(e, index), a.epilogue); });
}

// Input position i * stride + phase - pad receives, from tap r of that phase, dy at i - r * dilation / stride: one
// stride-1 product whose planes are dy, with a block of rows per phase that writes every stride-th position.
void conv_backward_input(const ConvBackwardInput& a) {
    if (empty(a.dx) || !a.dx.channels) return;
    const ConvGeometry& g = a.geometry;
    const int64_t phases = g.stride_h * g.stride_w;
    const int threads = limit_threads(a.weight, a.dy, a.threads);
    const Tables tables(a.weight.columns, phases);
    Engine e;
    e.in = a.dy, e.out = a.dx, e.weight = a.weight;
    e.groups = g.groups, e.group_channels = a.dy.channels / g.groups;
    e.map_rows = a.dx.channels / g.groups, e.group_rows = phases * e.map_rows;
    const int64_t base_h = floor_div(g.pad_top, g.stride_h), base_w = floor_div(g.pad_left, g.stride_w);
    const int64_t reach_h = (g.kh - 1) * g.dilation_h / g.stride_h, reach_w = (g.kw - 1) * g.dilation_w / g.stride_w;
    ConvGrid& grid = e.grid;
    grid.gh = floor_div(a.dx.height - 1 + g.pad_top, g.stride_h) - base_h + 1;
    grid.gw = floor_div(a.dx.width - 1 + g.pad_left, g.stride_w) - base_w + 1;
    grid.step_h = grid.step_w = 1;
    grid.pad_h = reach_h - base_h, grid.pad_w = reach_w - base_w, grid.halo_h = reach_h, grid.halo_w = reach_w;
    grid.phases = 1, tables.phase[0] = 0, grid.phase = tables.phase;
    grid.finish(a.dy.height, a.dy.width);
    int64_t k = 0;
    for (int64_t n = 0; n < e.group_channels; ++n)
        for (int64_t r = 0; r < g.kh; ++r)
            for (int64_t s = 0; s < g.kw; ++s, ++k) {
                tables.plane[k] = int32_t(n);
                tables.shift[k] = int32_t((reach_h - r * g.dilation_h / g.stride_h) * grid.pitch + reach_w -
                                          s * g.dilation_w / g.stride_w);
            }
    e.taps = {tables.plane, tables.shift};
    for (int64_t p = 0; p < phases; ++p) {
        const int64_t y = g.pad_top - p / g.stride_w, x = g.pad_left - p % g.stride_w;
        tables.maps[p] = {ceil_div(y, g.stride_h) - base_h,
                          floor_div(a.dx.height - 1 + y, g.stride_h) + 1 - base_h,
                          ceil_div(x, g.stride_w) - base_w,
                          floor_div(a.dx.width - 1 + x, g.stride_w) + 1 - base_w,
                          (base_h * g.stride_h - y) * a.dx.stride_h + (base_w * g.stride_w - x) * a.dx.stride_w,
                          g.stride_h * a.dx.stride_h,
                          g.stride_w * a.dx.stride_w};
    }
    e.maps = tables.maps, e.tiles = tile_count(a.weight), e.view = false;
    grid.compact = worth_compacting(e);
    e.values = float_values(a.weight, threads);
    const Epilogue none{nullptr, nullptr, Dtype::f32, Act::none};
    parallel_for(partition(e, threads), threads, [&](int64_t index) { run_task(e, task_at(e, index), none); });
}

// Tasks own tiles (or, with a single tile, rows), never pixels: every sum has one owner and one order.
void conv_backward_weight(const ConvBackwardWeight& a) {
    if (!a.weight.stored) return;
    const ConvStream& w = a.weight;
    const int threads = limit_threads(w, a.dy, a.threads);
    float* sums = scratch_of<float>(kSums, w.stored);
    zero(sums, w.stored);
    if (!empty(a.dy)) {
        const Tables tables(w.columns, a.geometry.stride_h * a.geometry.stride_w);
        Engine e = forward_engine(a.geometry, a.x, a.dy, w, tables);
        partition(e, 1);
        e.row_tasks = e.tiles < threads ? most(1, least(threads / e.tiles, e.group_rows)) : 1;
        const int64_t tile_tasks = least(e.tiles, threads), per = ceil_div(e.tiles, tile_tasks);
        const int64_t pixel_tasks = e.image_tasks * e.line_tasks, row_tasks = e.row_tasks;
        parallel_for(e.groups * row_tasks * tile_tasks, threads, [&](int64_t index) {
            const int64_t tile0 = index % tile_tasks * per, tile1 = least(tile0 + per, e.tiles);
            const int64_t tile = w.tile ? w.tile : w.columns, k1 = least(tile1 * tile, w.columns);
            int64_t c0 = e.group_channels, c1 = 0;
            for (int64_t k = tile0 * tile; k < k1; ++k)
                if (e.taps.plane[k] >= 0) {
                    c0 = least(c0, e.taps.plane[k] / e.grid.phases);
                    c1 = most(c1, e.taps.plane[k] / e.grid.phases + 1);
                }
            if (c0 >= c1) return;
            for (int64_t p = 0; p < pixel_tasks; ++p) {
                const ConvTask t = task_at(e, p * e.groups * row_tasks + index / tile_tasks);
                if (!t.rows) return;
                const TaskInput input(e, t, c0, c1);
                const int64_t vectors = ceil_div(task_length(e.grid, t), kLanes);
                float* dy = scratch_of<float>(kAcc, vectors * kLanes * t.rows);
                Piece* pieces = scratch_of<Piece>(kPieces, kStrip);
                for (int64_t i = 0; i < strip_count(vectors); ++i) {
                    const Strip s = strip_of(vectors, i);
                    const int64_t count =
                        make_pieces(e.grid, t, e.maps[0], a.dy.stride_b, s.first * kLanes, s.vectors * kLanes, pieces);
                    dispatch_float(a.dy.dtype, [&]<Dtype T>() {
                        const int64_t at = (t.group * e.group_rows + t.row0) * a.dy.stride_c * size_of(T);
                        read_strip<T>(static_cast<const char*>(a.dy.data) + at, a.dy.stride_c, a.dy.stride_w, pieces,
                                      count, t.rows, s.vectors, dy + s.first * kLanes * t.rows);
                    });
                }
                for (int64_t tile_at = tile0; tile_at < tile1; ++tile_at)
                    for (int64_t i = 0; i < strip_count(vectors); ++i) {
                        const Strip s = strip_of(vectors, i);
                        const StripInput in = input.strip(tile_at, s);
                        const int32_t *begin = input.segment(tile_at), *end = input.segment(tile_at + 1);
                        const float* d = dy + s.first * kLanes * t.rows;
                        const int64_t k0 = tile_at * w.tile;
                        dispatch_strip(s.vectors, [&]<int U>() {
                            if (w.tile)
                                strip_dots<U, false>(w.col, begin, end, t.rows,
                                                     {in.base - k0 * in.stride, in.stride, nullptr}, d, sums);
                            else
                                strip_dots<U, true>(w.col, begin, end, t.rows, in, d, sums);
                        });
                    }
            }
        });
    }
    dispatch_float(w.dtype, [&]<Dtype T>() {
        for (int64_t i = 0; i < w.stored; ++i) store_as<T>(a.dvalues, w.gather ? w.gather[i] : i, sums[i]);
    });
}

int64_t conv_tile(int64_t rows, int64_t columns, int64_t k, int64_t stored, int64_t pixels) {
    constexpr int64_t kPanel = 9216, kWidest = 256;  // floats: three quarters of the first cache
    if (columns == k && stored < 3 * columns) return 0;
    // Where rows are nearly empty a wider panel, though in the second cache, saves loading sums for few values.
    const int64_t strip = least(kStrip, most(1, ceil_div(pixels, kLanes)) * kLanes);
    const int64_t sparse = stored ? 6 * rows * columns / stored : kWidest;
    const int64_t tile = least(kWidest, most(kPanel / strip, sparse));
    return columns <= tile ? most(columns, 1) : tile;
}

}  // namespace

const ConvTable conv_table{conv_forward, conv_backward_input, conv_backward_weight, conv_tile};

SK_ISA_END
