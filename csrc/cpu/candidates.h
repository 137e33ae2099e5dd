// Storage of the sampled entries of many rows, which grow with each block of the vocabulary.
//
// A row's entries are a chain of 128-byte nodes, in the order of their columns. Nodes come from the
// pool of the thread that adds them and go back to the pool of the thread that drops them, so
// memory is that of the entries, and of at most one partly empty node a row.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

namespace bft::cpu {

struct Candidate {
    static constexpr uint32_t kUncounted = uint32_t{1} << 31;

    // The vocabulary index; kUncounted is set while the certificate's sums lack the entry.
    uint32_t tagged_column;
    float logit;  // after the last thinning it is the value of dy

    uint32_t column() const { return tagged_column & ~kUncounted; }
    bool uncounted() const { return tagged_column & kUncounted; }
};

struct CandidateNode {
    static constexpr uint32_t kEntries = 15;
    CandidateNode* next;
    Candidate entries[kEntries];
};

// Prefetches the two cache lines of the node `further` nodes on, which need not exist.
template <bool ToWrite>
inline void fetch_node(const CandidateNode* node, size_t further = 0) {
    const auto at = reinterpret_cast<uintptr_t>(node) + further * sizeof(CandidateNode);
    __builtin_prefetch(reinterpret_cast<const void*>(at), ToWrite);
    __builtin_prefetch(reinterpret_cast<const void*>(at + 64), ToWrite);
}

// Aligned so that pools of different threads, side by side in an array, share no cache line.
class alignas(128) CandidatePool {
  public:
    CandidateNode* take() {
        CandidateNode* node = free_;
        if (node != nullptr) {
            free_ = node->next;
        } else {
            if (unused_ == 0) grow();
            node = slabs_.back().get() + (kSlab - unused_--);  // in the order of their addresses
            fetch_node<true>(node, kAhead);
        }
        node->next = nullptr;
        return node;
    }

    void give(CandidateNode* node) {
        node->next = free_;
        free_ = node;
    }

  private:
    static constexpr size_t kSlab = 512;  // nodes, 64 KiB
    static constexpr size_t kAhead = 3;   // fetched before they are taken

    void grow() {
        slabs_.emplace_back(new CandidateNode[kSlab]);
        unused_ = kSlab;
    }

    std::vector<std::unique_ptr<CandidateNode[]>> slabs_;
    size_t unused_ = 0;  // nodes at the end of the last slab
    CandidateNode* free_ = nullptr;
};

// The chain of one row.
class Candidates {
  public:
    uint32_t count() const { return count_; }

    // Prefetches what add() will write to.
    void prefetch() const { fetch_node<true>(last_); }

    // Appends entry(0), ..., entry(count - 1).
    template <typename Entry>
    void add(int64_t count, Entry entry, CandidatePool& pool) {
        CandidateNode* node = last_;
        uint32_t place = count_ % CandidateNode::kEntries;
        for (int64_t k = 0; k < count; ++k) {
            if (place == 0) {  // the last node is full, or the chain has none
                node = pool.take();
                (last_ == nullptr ? first_ : last_->next) = node;
                last_ = node;
            }
            node->entries[place] = entry(k);
            place = place + 1 == CandidateNode::kEntries ? 0 : place + 1;
        }
        count_ += static_cast<uint32_t>(count);
    }

    // Prefetches what each() will read first.
    void prefetch_first() const { fetch_node<false>(first_); }

    // visit(entry) for each entry, in order.
    template <typename Visit>
    void each(Visit visit) const {
        const CandidateNode* node = first_;
        for (uint32_t left = count_; left > 0; node = node->next) {
            fetch_node<false>(node->next);
            const uint32_t here = std::min(left, CandidateNode::kEntries);
            for (uint32_t place = 0; place < here; ++place) visit(node->entries[place]);
            left -= here;
        }
    }

    // Keeps the entries for which keep(entry) is true; keep may change an entry.
    template <typename Keep>
    void filter(Keep keep, CandidatePool& pool) {
        CandidateNode* to = first_;
        CandidateNode* last = nullptr;  // the last node that holds something
        uint32_t kept = 0, target = 0;
        uint32_t left = count_;
        for (CandidateNode* from = first_; left > 0; from = from->next) {
            fetch_node<false>(from->next);
            const uint32_t here = std::min(left, CandidateNode::kEntries);
            left -= here;
            for (uint32_t place = 0; place < here; ++place) {
                Candidate entry = from->entries[place];
                if (!keep(entry)) continue;
                if (target == CandidateNode::kEntries) {
                    to = to->next;
                    target = 0;
                }
                to->entries[target++] = entry;
                last = to;
                ++kept;
            }
        }
        cut(kept, last, pool);
    }

    // Replaces all entries by entry(0), ..., entry(count - 1), which are not more.
    template <typename Entry>
    void replace(int64_t count, Entry entry, CandidatePool& pool) {
        CandidateNode* last = nullptr;
        for (int64_t k = 0; k < count;) {
            last = last == nullptr ? first_ : last->next;
            for (Candidate& to : last->entries) {
                if (k == count) break;
                to = entry(k++);
            }
        }
        cut(static_cast<uint32_t>(count), last, pool);
    }

    void clear(CandidatePool& pool) { cut(0, nullptr, pool); }

  private:
    // Gives back the nodes behind the last one in use; all nodes if that is null.
    void cut(uint32_t count, CandidateNode* last, CandidatePool& pool) {
        CandidateNode* rest = last == nullptr ? first_ : last->next;
        while (rest != nullptr) {
            CandidateNode* next = rest->next;
            pool.give(rest);
            rest = next;
        }
        if (last == nullptr) {
            first_ = nullptr;
        } else {
            last->next = nullptr;
        }
        last_ = last;
        count_ = count;
    }

    CandidateNode* first_ = nullptr;
    CandidateNode* last_ = nullptr;
    uint32_t count_ = 0;
};

}  // namespace bft::cpu
