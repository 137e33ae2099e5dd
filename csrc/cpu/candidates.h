// Storage of the sampled entries of many rows, which grow while the vocabulary is swept.
//
// A row's entries are a chain of 128-byte nodes, in the order of their columns. Nodes come from the
// pool of the thread that adds them and go back to the pool of the thread that drops them, so
// memory follows the entries that are there, at most one half-empty node a row apart.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace bft::cpu {

struct Candidate {
    static constexpr uint32_t kUncounted = uint32_t{1} << 31;

    // The vocabulary index; kUncounted is set while the certificate's sums do not hold the entry.
    uint32_t tagged_column;
    float logit;

    uint32_t column() const { return tagged_column & ~kUncounted; }
    bool uncounted() const { return tagged_column & kUncounted; }
};

struct CandidateNode {
    static constexpr uint32_t kEntries = 15;
    CandidateNode* next;
    Candidate entries[kEntries];
};

// On cache lines of its own: each thread has one, side by side in an array.
class alignas(128) CandidatePool {
  public:
    CandidateNode* take() {
        if (free_ == nullptr) grow();
        CandidateNode* node = free_;
        free_ = node->next;
        node->next = nullptr;
        return node;
    }

    void give(CandidateNode* node) {
        node->next = free_;
        free_ = node;
    }

  private:
    static constexpr size_t kSlab = 512;  // nodes, 64 KiB

    void grow() {
        slabs_.emplace_back(new CandidateNode[kSlab]);
        for (size_t i = 0; i < kSlab; ++i) give(&slabs_.back()[i]);
    }

    std::vector<std::unique_ptr<CandidateNode[]>> slabs_;
    CandidateNode* free_ = nullptr;
};

// The chain of one row.
class Candidates {
  public:
    uint32_t count() const { return count_; }

    // Fetches what add() will write to.
    void prefetch() const {
        __builtin_prefetch(last_, 1);
        __builtin_prefetch(reinterpret_cast<const char*>(last_) + 64, 1);
    }

    void add(Candidate entry, CandidatePool& pool) {
        const uint32_t place = count_ % CandidateNode::kEntries;
        if (place == 0) {
            CandidateNode* node = pool.take();
            (last_ == nullptr ? first_ : last_->next) = node;
            last_ = node;
        }
        last_->entries[place] = entry;
        ++count_;
    }

    // visit(entry) for each entry, in order.
    template <typename Visit>
    void each(Visit visit) const {
        const CandidateNode* node = first_;
        for (uint32_t i = 0; i < count_; ++i) {
            const uint32_t place = i % CandidateNode::kEntries;
            if (i > 0 && place == 0) node = node->next;
            visit(node->entries[place]);
        }
    }

    // Keeps the entries for which keep(entry) is true; keep may change an entry.
    template <typename Keep>
    void filter(Keep keep, CandidatePool& pool) {
        CandidateNode* from = first_;
        CandidateNode* to = first_;
        const uint32_t before = count_;
        uint32_t kept = 0;
        CandidateNode* last = nullptr;
        for (uint32_t i = 0; i < before; ++i) {
            const uint32_t place = i % CandidateNode::kEntries;
            if (i > 0 && place == 0) from = from->next;
            Candidate entry = from->entries[place];
            if (!keep(entry)) continue;
            const uint32_t target = kept % CandidateNode::kEntries;
            if (kept > 0 && target == 0) to = to->next;
            to->entries[target] = entry;
            last = to;
            ++kept;
        }
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
        count_ = kept;
    }

    void clear(CandidatePool& pool) {
        filter([](Candidate&) { return false; }, pool);
    }

  private:
    CandidateNode* first_ = nullptr;
    CandidateNode* last_ = nullptr;
    uint32_t count_ = 0;
};

}  // namespace bft::cpu
