#include "tests/cuda/emulation/block.h"

#include <algorithm>
#include <cstring>

namespace bft::emulation {

// NaN in every floating type, and no plausible index.
static constexpr unsigned char kPoison = 0xFF;

static std::string text(uint3 index) {
    return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
           std::to_string(index.z) + ")";
}

Block::Block(std::string kernel, dim3 grid, dim3 block, size_t shared_bytes)
    : kernel_(std::move(kernel)),
      grid_(grid),
      block_(block),
      shared_bytes_(shared_bytes),
      shared_(shared_bytes + 16),
      threads_(block.count()),
      warp_stamps_((block.count() + 31) / 32),
      generator_(options().seed) {
    for (uint32_t i = 0; i < threads_.size(); ++i) {
        Thread& thread = threads_[i];
        thread.number = i;
        thread.warp = i / 32;
        thread.lane = i % 32;
        thread.index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
    }
}

void Block::enter(void* argument) {
    Block& self = *running_block;
    try {
        (*self.body_)();
    } catch (const Cancelled&) {
    } catch (...) {
        if (!self.failure_) self.failure_ = std::current_exception();
    }
    static_cast<Thread*>(argument)->state = Thread::State::kExited;
}

void Block::run(uint3 index, uint32_t launch_serial, const std::function<void()>& body) {
    index_ = blockIdx = index;
    gridDim = grid_;
    blockDim = block_;
    launch_serial_ = launch_serial;
    serial_ = next_serial();
    body_ = &body;
    epoch_ = 1;
    cancelled_ = false;
    failure_ = nullptr;
    std::fill(shared_.begin(), shared_.end(), kPoison);
    std::fill(warp_stamps_.begin(), warp_stamps_.end(), 1);
    shadow_.reset(shared_bytes_);
    ready_.clear();
    for (Thread& thread : threads_) {
        thread.state = Thread::State::kNew;
        thread.seen.fill(0);
        thread.copies.clear();
        thread.group = 0;
        thread.fiber.start(&Block::enter, &thread);
        ready_.push_back(&thread);
    }
    std::vector<Thread*> round;
    try {
        while (true) {
            if (ready_.empty()) settle();
            if (ready_.empty()) break;
            round.swap(ready_);
            ready_.clear();
            std::shuffle(round.begin(), round.end(), generator_);
            for (Thread* thread : round) {
                running_ = thread;
                threadIdx = thread->index;
                thread->state = Thread::State::kReady;
                thread->fiber.resume();
                if (failure_) std::rethrow_exception(failure_);
            }
        }
    } catch (...) {
        cancel();
        failure_ = nullptr;
        throw;
    }
}

// Unwinds the stacks of all threads that are in the middle of the kernel.
void Block::cancel() {
    cancelled_ = true;
    for (Thread& thread : threads_) {
        if (thread.state == Thread::State::kNew || thread.state == Thread::State::kExited) continue;
        running_ = &thread;
        thread.fiber.resume();
    }
}

void Block::suspend() {
    running_->fiber.suspend();
    if (cancelled_) throw Cancelled{};
}

void Block::yield() {
    ready_.push_back(running_);
    suspend();
}

// Nothing can run: opens the barrier if that is where everyone is, and finds fault if not.
void Block::settle() {
    const Thread* waiting = nullptr;  // at a barrier
    for (const Thread& thread : threads_) {
        if (thread.state == Thread::State::kAtBarrier) waiting = &thread;
        if (thread.state != Thread::State::kAtCollective) continue;
        std::string missing;
        for (uint32_t lane = 0; lane < 32; ++lane) {
            if ((thread.mask >> lane & 1) == 0 || lane == thread.lane) continue;
            const uint32_t other = thread.warp * 32 + lane;
            if (other >= threads_.size()) {
                missing += "; lane " + std::to_string(lane) + " does not exist";
            } else if (const Thread& peer = threads_[other];
                       peer.state != Thread::State::kAtCollective || peer.mask != thread.mask ||
                       std::strcmp(peer.operation, thread.operation) != 0 ||
                       !(peer.site == thread.site)) {
                missing += "; lane " + std::to_string(lane) + " " + describe(peer);
            }
        }
        fail(Kind::kMissingLane, thread, thread.site,
             std::string(thread.operation) + " waits for lanes that do not come" + missing);
    }
    if (waiting == nullptr) return;
    for (const Thread& thread : threads_) {
        if (thread.state == Thread::State::kAtBarrier && thread.site == waiting->site &&
            std::strcmp(thread.operation, waiting->operation) == 0) {
            continue;
        }
        fail(Kind::kDivergentBarrier, *waiting, waiting->site,
             std::string(waiting->operation) + " is not reached by thread " + text(thread.index) +
                 ", which " + describe(thread));
    }
    ++epoch_;
    votes_ = 0;
    for (Thread& thread : threads_) {
        votes_ += thread.vote != 0;
        thread.state = Thread::State::kReady;
        ready_.push_back(&thread);
    }
}

std::string Block::describe(const Thread& thread) const {
    switch (thread.state) {
        case Thread::State::kExited:
            return "has exited";
        case Thread::State::kAtBarrier:
        case Thread::State::kAtCollective:
            return std::string("waits at ") + thread.operation + ", " + thread.site.text();
        default:
            return "runs";
    }
}

int Block::barrier(const char* operation, int vote, Site site) {
    running_->operation = operation;
    running_->site = site;
    running_->vote = vote;
    running_->state = Thread::State::kAtBarrier;
    suspend();
    return static_cast<int>(votes_);
}

bool Block::arrive(const char* operation, uint32_t mask, bool same_line, Site site, void* operands,
                   Lanes& lanes) {
    Thread& self = *running_;
    if ((mask >> self.lane & 1) == 0) {
        fail(Kind::kMissingLane, site, std::string(operation) + " with a mask without its caller");
    }
    self.operation = operation;
    self.mask = mask;
    self.site = site;
    self.operands = operands;
    self.state = Thread::State::kAtCollective;
    const uint32_t first = self.warp * 32;
    for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
        const uint32_t lane = static_cast<uint32_t>(__builtin_ctz(rest));
        if (first + lane >= threads_.size()) return false;
        Thread& peer = threads_[first + lane];
        if (peer.state != Thread::State::kAtCollective || peer.mask != mask ||
            std::strcmp(peer.operation, operation) != 0 || (same_line && !(peer.site == site))) {
            return false;
        }
        lanes[lane] = peer.operands;
    }
    return true;
}

void Block::release(uint32_t mask, Orders orders) {
    const uint32_t first = running_->warp * 32;
    const bool ordered = orders == Orders::kMemory ||
                         (orders == Orders::kIfOptions && options().collectives_order_memory);
    std::array<uint32_t, 32> seen{};
    for (uint32_t lane = 0; lane < 32; ++lane) {
        if ((mask >> lane & 1) == 0) continue;
        Thread& thread = threads_[first + lane];
        thread.state = Thread::State::kReady;
        if (&thread != running_) ready_.push_back(&thread);
        for (uint32_t i = 0; i < 32 && ordered; ++i) seen[i] = std::max(seen[i], thread.seen[i]);
    }
    if (!ordered) return;
    uint32_t& stamp = warp_stamps_[running_->warp];
    for (uint32_t lane = 0; lane < 32; ++lane) {
        if (mask >> lane & 1) seen[lane] = stamp;
    }
    for (uint32_t lane = 0; lane < 32; ++lane) {
        if (mask >> lane & 1) threads_[first + lane].seen = seen;
    }
    ++stamp;
}

Actor Block::actor(const Thread& thread) const {
    return {epoch_, warp_stamps_[thread.warp], static_cast<uint16_t>(thread.warp),
            static_cast<uint8_t>(thread.lane), thread.seen.data()};
}

void Block::read(uint32_t lane, size_t offset, size_t bytes, Site site) {
    const Thread& thread = threads_[running_->warp * 32 + lane];
    if (auto found = shadow_.read(offset, bytes, actor(thread))) {
        fail(found->kind, thread, site,
             found->text + " (shared byte " + std::to_string(found->offset) + ")");
    }
}

void Block::write(size_t offset, size_t bytes, bool async, Site site) {
    if (auto found = shadow_.write(offset, bytes, actor(*running_), async)) {
        fail(found->kind, site,
             found->text + " (shared byte " + std::to_string(found->offset) + ")");
    }
}

void Block::global(Range* range, const void* address, size_t bytes, Touch how, Site site) {
    const GlobalActor actor{launch_serial_, serial_, static_cast<uint16_t>(running_->number),
                            static_cast<uint16_t>(epoch_)};
    const auto at = reinterpret_cast<uintptr_t>(address);
    if (auto found = touch_global(range, at, bytes, how, actor)) {
        fail(found->kind, site, found->text);
    }
}

void Block::issue(uint32_t offset, const unsigned char* data, uint32_t bytes, Site site) {
    write(offset, bytes, true, site);
    std::memset(shared() + offset, kPoison, bytes);
    Copy copy{running_->group, offset, bytes, {}};
    std::memcpy(copy.data, data, bytes);
    running_->copies.push_back(copy);
}

void Block::wait(uint32_t groups_left) {
    std::vector<Copy>& copies = running_->copies;
    size_t kept = 0;
    for (const Copy& copy : copies) {
        if (copy.group + groups_left < running_->group) {
            std::memcpy(shared() + copy.offset, copy.data, copy.bytes);
            shadow_.deliver(copy.offset, copy.bytes, actor(*running_));
        } else {
            copies[kept++] = copy;
        }
    }
    copies.resize(kept);
}

void Block::fail(Kind kind, const Thread& thread, Site site, const std::string& what) const {
    throw Error(kind, "kernel " + kernel_ + ", block " + text(index_) + ", thread " +
                          text(thread.index) + ", " + site.text() + ": " + what);
}

}  // namespace bft::emulation
