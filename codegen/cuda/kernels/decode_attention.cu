// Attention of one new token to a key-value cache, after Flash-Decoding (https://pytorch.org/blog/flash-decoding) and
// FlashAttention-2 (https://arxiv.org/abs/2307.08691):
//
//     y[b, h] = softmax(scale · q[b, h] · K[b, h / group]ᵀ) · V[b, h / group]
//     K = key_scale · stored keys,   V = value_scale · stored values
//
// A block has all queries of one key-value head, so that the cache is read once, and a part of the tokens (blockIdx.z).
// Its warps work alone: each has its own tiles of TOKENS tokens, which come through its own ring of STAGES tiles of
// shared memory, and its own running softmax in float32. Only at the end the block joins them.
//
// A scale for each channel costs nothing per number: key scales are multiplied into the queries beforehand, value
// scales into the result. Tensor cores multiply what is stored, widened to 16-bit floats, by 16-bit floats:
//
//     scores[16, 8]  = queries[16, 16 channels] · keys[16 channels, 8 tokens]
//     sums[16, 8]   += values[16 channels, 16 tokens] · weights[16 tokens, 8 heads]
//
// A query in float32 is the sum of two 16-bit floats: the first 8 rows of `queries` have the coarse parts of 8 heads,
// the last 8 the fine ones. Weights are two 16-bit floats, too. A lane has the results of the first product where the
// second takes its weights from.
//
// Compiled with: ELEMENT (Half, BFloat), CACHE_BITS (16: ELEMENT; 8: int8; 4: q + 8, the even channel in the low bits),
// HEAD_SIZE, HEAD_TILES (8 heads each), TOKENS, WARPS, STAGES, SOFTCAP, BIAS (a number for each token that is added to its
// scores).
#include "join.cuh"
#include "widen.cuh"

#if CACHE_BITS == 16
using Number = ELEMENT;  // what tensor cores multiply
#else
using Number = Half;  // which has all integers of 8 bits
#endif

constexpr int kThreads = 32 * WARPS;
constexpr int kHeads = 8 * HEAD_TILES;
constexpr int kWordPairs = 16 / CACHE_BITS, kWordNumbers = 2 * kWordPairs;  // of 32 bits of the cache
constexpr int kRowWords = HEAD_SIZE / kWordNumbers, kRowBytes = 4 * kRowWords, kRowChunks = kRowBytes / 16;
constexpr int kRowStride = kRowBytes % 32 ? kRowBytes : kRowBytes + 16;  // so that rows meet no bank twice
constexpr int kTileBytes = TOKENS * kRowStride, kStageBytes = 2 * kTileBytes;  // keys, then values
constexpr int kKeyTiles = TOKENS / 8;   // of tensor-core instructions
constexpr int kSteps = HEAD_SIZE / 16;  // of them along a key
constexpr int kLoadWords = kWordPairs == 1 ? 2 : 1;  // of a key, which make whole steps
constexpr int kLoadSteps = kLoadWords * kWordPairs / 2;
constexpr int kValueWords = (kRowWords + 7) / 8;  // of a row that a lane has; the last may lie beyond the row
constexpr int kQueryBytes = HEAD_TILES * kSteps * 512;
constexpr int kUnitBytes = kHeads * 4;
constexpr int kResultStride = HEAD_SIZE + 2;  // floats, see join.cuh
constexpr int kResultBytes = kHeads * kResultStride * 4;
constexpr int kWarpBytes = STAGES * kStageBytes > kResultBytes ? STAGES * kStageBytes : kResultBytes;
constexpr float kLog2OfE = 1.4426950408889634f, kSmallestNormal = 1.1754944e-38f;
static_assert(HEAD_SIZE % (16 * kLoadSteps) == 0 && kRowBytes % 16 == 0, "lanes share a row evenly, in 16 bytes");
static_assert(TOKENS % 16 == 0, "values are multiplied 16 tokens at a time");

struct Problem {
  const ELEMENT* queries;       // [group, HEAD_SIZE]
  const unsigned char* keys;    // [capacity, kRowBytes]
  const unsigned char* values;  // the same
  const float* key_scales;      // of this head; the next channel's is `key_stride` on
  const float* value_scales;
  int key_stride, value_stride;
  int group;
  int first, end;  // tokens of this block
};

using Scores = float[kKeyTiles][4];
using Sums = float[kValueWords][kWordPairs][4];

DEVICE uint32_t word_at(const unsigned char* place) { return *reinterpret_cast<const uint32_t*>(place); }

// Two numbers as sums of two 16-bit floats.
DEVICE void split(float low, float high, uint32_t& coarse, uint32_t& fine) {
  coarse = pack<Number>(low, high);
  fine = pack<Number>(low - to_float(Number{static_cast<uint16_t>(coarse)}),
                      high - to_float(Number{static_cast<uint16_t>(coarse >> 16)}));
}

// ------------------------------------------------------------------------------------------------------ queries

// A number of a query with its key scale; 0 for the heads that fill the last tile up.
DEVICE float folded(const Problem& problem, int head, int channel) {
  if (head >= problem.group) return 0;
  const float number = to_float(problem.queries[head * HEAD_SIZE + channel]);
  return CACHE_BITS == 16 ? number : number * problem.key_scales[channel * problem.key_stride];
}

// The power of two below the largest number of each query: divided by it, they lie well in the range of Half.
DEVICE void find_units(const Problem& problem, float* units) {
  for (int head = threadIdx.x / 32; head < kHeads; head += WARPS) {
    float largest = kSmallestNormal;
    for (int channel = threadIdx.x % 32; channel < HEAD_SIZE; channel += 32)
      largest = fmaxf(largest, fabsf(folded(problem, head, channel)));
#pragma unroll
    for (int lanes = 16; lanes; lanes /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, lanes));
    if (threadIdx.x % 32 == 0)
      units[head] = CACHE_BITS == 16 ? 1 : __uint_as_float(__float_as_uint(largest) & 0x7f800000);
  }
}

// Lays out the queries as lanes feed them to the tensor cores: lane 4 g + t has of head g the channels whose keys it
// has as well, coarse and fine. `queries` is [HEAD_TILES, kSteps, 32].
DEVICE void fold_queries(const Problem& problem, uint4* queries, float* units) {
  find_units(problem, units);
  __syncthreads();  // units are there for all
  for (int place = threadIdx.x; place < HEAD_TILES * kSteps * 32; place += kThreads) {
    const int lane = place % 32, step = place / 32 % kSteps, head = place / 32 / kSteps * 8 + lane / 4;
    uint32_t coarse[2], fine[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int pair = 2 * step + half, word = pair / kWordPairs * 4 + lane % 4;
      const int channel = word * kWordNumbers + pair % kWordPairs;
      split(folded(problem, head, channel) / units[head],
            folded(problem, head, channel + kWordPairs) / units[head], coarse[half], fine[half]);
    }
    queries[place] = uint4{coarse[0], fine[0], coarse[1], fine[1]};
  }
  __syncthreads();  // queries are there for all
}

// -------------------------------------------------------------------------------------------------------- tiles

// Starts a warp's copies of one tile; rows beyond the last token become zeros.
DEVICE void load_tile(const Problem& problem, unsigned char* stage, int tile) {
  const int first = problem.first + tile * TOKENS, chunks = (problem.end - first) * kRowChunks;
  for (int chunk = threadIdx.x % 32; chunk < TOKENS * kRowChunks; chunk += 32) {
    const bool real = chunk < chunks;
    const size_t source = real ? static_cast<size_t>(first) * kRowBytes + chunk * 16 : 0;
    unsigned char* target = stage + chunk / kRowChunks * kRowStride + chunk % kRowChunks * 16;
    copy_async(target, problem.keys + source, real);
    copy_async(target + kTileBytes, problem.values + source, real);
  }
}

// Products of queries and keys. Lane 4 g + t gets those of head g and the tokens 8 n + 2 t and the next: coarse parts
// first, fine ones behind.
DEVICE void score(const unsigned char* keys, const uint4* queries, Scores (&scores)[HEAD_TILES]) {
  const int lane = threadIdx.x % 32;
  const unsigned char* own = keys + lane / 4 * kRowStride + lane % 4 * 4;
#pragma unroll
  for (int load = 0; load < kSteps / kLoadSteps; load++) {
    uint32_t a[HEAD_TILES][kLoadSteps][4];
#pragma unroll
    for (int i = 0; i < HEAD_TILES * kLoadSteps; i++) {
      const int tile = i / kLoadSteps, step = i % kLoadSteps;
      const uint4 query = queries[(tile * kSteps + load * kLoadSteps + step) * 32 + lane];
      a[tile][step][0] = query.x, a[tile][step][1] = query.y, a[tile][step][2] = query.z, a[tile][step][3] = query.w;
    }
#pragma unroll
    for (int n = 0; n < kKeyTiles; n++) {
      uint32_t pairs[kLoadWords][kWordPairs];
#pragma unroll
      for (int word = 0; word < kLoadWords; word++)
        widen<Number>(word_at(own + n * 8 * kRowStride + (load * kLoadWords + word) * 16), pairs[word]);
#pragma unroll
      for (int i = 0; i < HEAD_TILES * kLoadSteps; i++) {
        const int tile = i / kLoadSteps, step = i % kLoadSteps, second = 2 * step + 1;
        multiply_add<Number>(scores[tile][n], a[tile][step], pairs[2 * step / kWordPairs][2 * step % kWordPairs],
                             pairs[second / kWordPairs][second % kWordPairs]);
      }
    }
  }
}

// Running softmax of one head of each tile, head g of lane 4 g + t.
struct Softmax {
  float factor;   // of scores
  float largest;  // of them so far
  float sum;      // of this lane's weights
};

// Scores to weights, in place of the coarse parts. Returns what earlier sums are multiplied by. `tokens` are those from
// this lane's first on, as is `bias`.
DEVICE float weigh(Scores& scores, Softmax& softmax, int tokens, float softcap, const float* bias) {
  float largest = softmax.largest;
#pragma unroll
  for (int i = 0; i < 2 * kKeyTiles; i++) {
    float& place = scores[i / 2][i % 2];
    float value = (place + scores[i / 2][i % 2 + 2]) * softmax.factor;
    if (SOFTCAP) value = softcap * kLog2OfE * tanhf(value);
    const int token = i / 2 * 8 + i % 2;
    if (BIAS && token < tokens) value += kLog2OfE * bias[token];
    place = token < tokens ? value : kLowest;
    largest = fmaxf(largest, place);
  }
  largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
  largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
  const float rescale = exp2f(softmax.largest - largest);
  softmax.largest = largest;
  softmax.sum *= rescale;
#pragma unroll
  for (int i = 0; i < 2 * kKeyTiles; i++) {
    const float weight = exp2f(scores[i / 2][i % 2] - largest);
    scores[i / 2][i % 2] = weight;
    softmax.sum += weight;
  }
  return rescale;
}

// Multiplies the sums of the heads 2 t and 2 t + 1, which lane 4 g + t has, by what the lanes of these heads have.
DEVICE void rescale_sums(Sums& sums, float rescale) {
  const int first = threadIdx.x % 4 * 8;
  const float even = __shfl_sync(~0u, rescale, first), odd = __shfl_sync(~0u, rescale, first + 4);
#pragma unroll
  for (int i = 0; i < kValueWords * kWordPairs * 4; i++)
    sums[i / 4 / kWordPairs][i / 4 % kWordPairs][i % 4] *= i % 2 ? odd : even;
}

// Where a lane's word of a row is; one beyond the row becomes the last, and its sums are not used.
DEVICE int value_word(int word) {
  const int found = word * 8 + threadIdx.x % 32 / 4;
  return kRowWords % 8 && found >= kRowWords ? kRowWords - 1 : found;
}

// Adds weights · values. Lane 4 g + t gets, of its words, the channels i (entries 0 and 1) and i + half the word
// (entries 2 and 3) of the heads 2 t and 2 t + 1. Pairs are numbers of one channel and two neighbouring tokens.
DEVICE void add_values(const unsigned char* values, const Scores (&weights)[HEAD_TILES], Sums (&sums)[HEAD_TILES]) {
#pragma unroll
  for (int tokens = 0; tokens < kKeyTiles; tokens += 2) {
    uint32_t coarse[HEAD_TILES][2], fine[HEAD_TILES][2];
#pragma unroll
    for (int i = 0; i < HEAD_TILES * 2; i++) {
      const float* pair = weights[i / 2][tokens + i % 2];
      split(pair[0], pair[1], coarse[i / 2][i % 2], fine[i / 2][i % 2]);
    }
    const unsigned char* rows = values + (tokens * 8 + threadIdx.x % 4 * 2) * kRowStride;
#pragma unroll
    for (int word = 0; word < kValueWords; word++) {
      uint32_t pairs[2][2][kWordPairs];
#pragma unroll
      for (int later = 0; later < 2; later++) {
        const unsigned char* place = rows + later * 8 * kRowStride + value_word(word) * 4;
        const uint32_t even = word_at(place), odd = word_at(place + kRowStride);
        widen<Number>(select_bytes<0x5410>(even, odd), pairs[later][0]);
        widen<Number>(select_bytes<0x7632>(even, odd), pairs[later][1]);
      }
#pragma unroll
      for (int i = 0; i < kWordPairs; i++) {
        const uint32_t a[4] = {pairs[0][0][i], pairs[0][1][i], pairs[1][0][i], pairs[1][1][i]};
#pragma unroll
        for (int tile = 0; tile < HEAD_TILES; tile++) {
          multiply_add<Number>(sums[tile][word][i], a, coarse[tile][0], coarse[tile][1]);
          multiply_add<Number>(sums[tile][word][i], a, fine[tile][0], fine[tile][1]);
        }
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------------ results

// Leaves what a warp has in shared memory, [kHeads, kResultStride].
DEVICE void leave(float* results, const Sums& sums, const Softmax& softmax, int tile) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kValueWords * kWordPairs * 4; i++) {
    const int word = i / 4 / kWordPairs, pair = i / 4 % kWordPairs, entry = i % 4;
    if (kRowWords % 8 && word * 8 + lane / 4 >= kRowWords) continue;
    const int head = tile * 8 + lane % 4 * 2 + entry % 2;
    const int channel = value_word(word) * kWordNumbers + entry / 2 * kWordPairs + pair;
    results[head * kResultStride + channel] = sums[word][pair][entry];
  }
  float sum = softmax.sum;
  sum += __shfl_xor_sync(~0u, sum, 1);
  sum += __shfl_xor_sync(~0u, sum, 2);
  if (lane % 4) return;
  float* own = results + (tile * 8 + lane / 4) * kResultStride + HEAD_SIZE;
  own[0] = softmax.largest;
  own[1] = sum;
}

// Joins what the warps left, and stores it: rounded, or as a part.
DEVICE void finish(const Problem& problem, const float* results, ELEMENT* y, float* part) {
  for (int place = threadIdx.x * 2; place < problem.group * HEAD_SIZE; place += kThreads * 2) {
    const int head = place / HEAD_SIZE, channel = place % HEAD_SIZE;
    Joined all = join(results + head * kResultStride, kWarpBytes / 4, WARPS, HEAD_SIZE, channel);
    if (CACHE_BITS != 16) {
      all.low *= problem.value_scales[channel * problem.value_stride];
      all.high *= problem.value_scales[(channel + 1) * problem.value_stride];
    }
    if (gridDim.z == 1) {
      *reinterpret_cast<uint32_t*>(y + place) = divided<ELEMENT>(all);
      continue;
    }
    float* row = part + head * kResultStride;
    row[channel] = all.low;
    row[channel + 1] = all.high;
    if (channel) continue;
    row[HEAD_SIZE] = all.largest;
    row[HEAD_SIZE + 1] = all.sum;
  }
}

// The tokens of this block: those of its part of what the window shows.
DEVICE void choose_tokens(Problem& problem, int length, int window) {
  const int start = window && length > window ? length - window : 0, splits = gridDim.z;
  const int tiles = (length - start + TOKENS - 1) / TOKENS, share = (tiles + splits - 1) / splits * TOKENS;
  const int left = length - start - static_cast<int>(blockIdx.z) * share;
  problem.end = left < share ? length : length - left + share;
  problem.first = length - left;
}

KERNEL void __launch_bounds__(kThreads)
    decode_attention(const ELEMENT* q, const unsigned char* keys, const unsigned char* values, const float* key_scales,
                     const float* value_scales, const int* lengths, const float* bias, ELEMENT* y, float* parts,
                     int capacity, int group, int window, int key_stride, int value_stride, int bias_stride, float scale,
                     float softcap) {
  SHARED_MEMORY(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const size_t kv_head = static_cast<size_t>(blockIdx.y) * gridDim.x + blockIdx.x;
  const int first_scale = blockIdx.x * HEAD_SIZE, length = lengths[blockIdx.y];
  Problem problem{q + kv_head * group * HEAD_SIZE,
                  keys + kv_head * capacity * kRowBytes,
                  values + kv_head * capacity * kRowBytes,
                  key_scales + first_scale * key_stride,
                  value_scales + first_scale * value_stride,
                  key_stride,
                  value_stride,
                  group};
  if (BIAS) bias += static_cast<size_t>(blockIdx.y) * bias_stride;
  choose_tokens(problem, length < capacity ? length : capacity, window);
  const int left = (problem.end - problem.first + TOKENS - 1) / TOKENS - warp;
  const int tiles = left > 0 ? (left + WARPS - 1) / WARPS : 0;  // of this warp: every WARPS-th
  uint4* queries = reinterpret_cast<uint4*>(shared);
  float* units = reinterpret_cast<float*>(shared + kQueryBytes);
  unsigned char* rings = shared + kQueryBytes + kUnitBytes;
  unsigned char* ring = rings + warp * kWarpBytes;
#pragma unroll
  for (int tile = 0; tile < STAGES - 1; tile++) {
    if (tile < tiles) load_tile(problem, ring + tile * kStageBytes, tile * WARPS + warp);
    commit_copies();
  }
  fold_queries(problem, queries, units);
  Softmax softmax[HEAD_TILES];
#pragma unroll
  for (int tile = 0; tile < HEAD_TILES; tile++)
    softmax[tile] = {scale * units[tile * 8 + lane / 4] * (SOFTCAP ? 1 / softcap : kLog2OfE), kLowest, 0};
  Sums sums[HEAD_TILES] = {};
  for (int tile = 0; tile < tiles; tile++) {
    wait_for_copies<STAGES - 2>();
    __syncwarp();  // this tile is there for all lanes, and the one before has been read by all
    const int next = tile + STAGES - 1;
    if (next < tiles) load_tile(problem, ring + next % STAGES * kStageBytes, next * WARPS + warp);
    commit_copies();
    const unsigned char* stage = ring + tile % STAGES * kStageBytes;
    const int own = problem.first + (tile * WARPS + warp) * TOKENS + lane % 4 * 2, tokens = problem.end - own;
    Scores scores[HEAD_TILES] = {};
    score(stage, queries, scores);
#pragma unroll
    for (int heads = 0; heads < HEAD_TILES; heads++)
      rescale_sums(sums[heads], weigh(scores[heads], softmax[heads], tokens, softcap, bias + own));
    add_values(stage + kTileBytes, scores, sums);
  }
  wait_for_copies<0>();
  __syncwarp();  // all lanes have read the last tile, where results go now
#pragma unroll
  for (int heads = 0; heads < HEAD_TILES; heads++)
    leave(reinterpret_cast<float*>(ring), sums[heads], softmax[heads], heads);
  __syncthreads();  // all warps have left their results
  const size_t rows = static_cast<size_t>(gridDim.y) * gridDim.x * group;
  finish(problem, reinterpret_cast<const float*>(rings), y + kv_head * group * HEAD_SIZE,
         parts + (blockIdx.z * rows + kv_head * group) * kResultStride);
}
